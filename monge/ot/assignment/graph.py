"""The residual graph of an assignment: which class of rows can move from a column to another, at what loss.

A node is a column. The arc e -> f moves one unit from e to f at the loss

    W[e,f] = min over classes g that use e and can take f of S_ge - S_gf,

a class being a set of equal rows, which counts with its size (one row is the ordinary case). The arcs out
of a column are computed when a search first reaches it. A move then updates what it lowers, and marks as
stale (no class, the loss kept as a lower bound) what it may raise: a stale arc is only computed again when
its bound is low enough to matter.

Unused capacity is one more class: a free slot is kept on a column or, where it has no place, on a last
node. It moves between that node and any column at loss 0.

Shapes: G classes, n rows, E columns, K choices per row, N nodes (E, or E + 1 with unused capacity).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit


class Graph(NamedTuple):
    """The assignment of G classes and the arcs it offers."""

    score_GE: np.ndarray  # float64
    open_GE: np.ndarray  # the score where the class can take another unit of the column, else -inf
    size_G: np.ndarray  # rows in the class
    units_GE: np.ndarray  # units of the class on the column, at most its size
    member_EG: np.ndarray  # the classes on a column, in its first count_E places
    place_GE: np.ndarray  # where a class stands in the member list of a column
    count_E: np.ndarray
    loss_NN: np.ndarray  # W, or a lower bound of it where stale
    via_NN: np.ndarray  # the class that attains it, -1 where stale
    fresh_E: np.ndarray  # False until the arcs out of a column are first computed
    free_E: np.ndarray  # free slots kept on the column
    excess_N: np.ndarray  # load + free slots - capacity; of the last node: free slots not kept anywhere


@njit(cache=True, nogil=True)
def build(score_GE, class_n, size_G, indices_nK, free_E, excess_N):
    """The graph of an assignment of n rows in G classes."""
    num_classes, num_columns = score_GE.shape
    num_nodes = excess_N.shape[0]
    units_GE = np.zeros((num_classes, num_columns), np.int64)
    for t in range(class_n.shape[0]):
        for e in indices_nK[t]:
            units_GE[class_n[t], e] += 1
    open_GE = score_GE.copy()
    member_EG = np.empty((num_columns, num_classes), np.int32)
    place_GE = np.empty((num_classes, num_columns), np.int32)
    count_E = np.zeros(num_columns, np.int64)
    for g in range(num_classes):
        for e in range(num_columns):
            if units_GE[g, e] > 0:
                member_EG[e, count_E[e]] = g
                place_GE[g, e] = count_E[e]
                count_E[e] += 1
                if units_GE[g, e] == size_G[g]:
                    open_GE[g, e] = -np.inf
    loss_NN = np.full((num_nodes, num_nodes), np.inf)
    via_NN = np.zeros((num_nodes, num_nodes), np.int64)
    if num_nodes > num_columns:
        loss_NN[num_columns, :num_columns] = 0.0
        for e in range(num_columns):
            if free_E[e] > 0:
                loss_NN[e, num_columns] = 0.0
    return Graph(
        score_GE, open_GE, size_G, units_GE, member_EG, place_GE, count_E, loss_NN, via_NN,
        np.zeros(num_columns, np.bool_), free_E, excess_N,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def refresh(graph, e):
    """Compute every arc from column e to another."""
    num_columns = graph.count_E.shape[0]
    loss_F, via_F = graph.loss_NN[e, :num_columns], graph.via_NN[e, :num_columns]
    loss_F[:] = np.inf
    via_F[:] = 0
    for i in range(graph.count_E[e]):
        g = np.int64(graph.member_EG[e, i])
        own, open_F = graph.score_GE[g, e], graph.open_GE[g]
        for f in range(num_columns):
            loss = own - open_F[f]
            less = loss < loss_F[f]
            via_F[f] = g if less else via_F[f]
            loss_F[f] = loss if less else loss_F[f]
    loss_F[e] = np.inf
    graph.fresh_E[e] = True


@njit(cache=True, nogil=True)
def refresh_arc(graph, e, f):
    """Compute the arc from column e to column f."""
    best, via = np.inf, np.int64(0)
    for i in range(graph.count_E[e]):
        g = np.int64(graph.member_EG[e, i])
        loss = graph.score_GE[g, e] - graph.open_GE[g, f]
        if loss < best:
            best, via = loss, g
    graph.loss_NN[e, f], graph.via_NN[e, f] = best, via


@njit(inline="always")
def move(graph, g, e, f, amount):
    """Move units of class g from column e to column f; arcs that lose their class become stale."""
    num_columns = graph.count_E.shape[0]
    units_E, size = graph.units_GE[g], graph.size_G[g]
    reopened, arrived = units_E[e] == size, units_E[f] == 0
    units_E[e] -= amount
    units_E[f] += amount
    closed = units_E[f] == size
    if reopened:
        graph.open_GE[g, e] = graph.score_GE[g, e]
    if closed:
        graph.open_GE[g, f] = -np.inf
    if units_E[e] == 0:
        last, place = graph.member_EG[e, graph.count_E[e] - 1], graph.place_GE[g, e]
        graph.member_EG[e, place] = last
        graph.place_GE[last, e] = place
        graph.count_E[e] -= 1
        via_H = graph.via_NN[e]
        for h in range(num_columns):
            via_H[h] = -1 if via_H[h] == g else via_H[h]
    if arrived:
        graph.member_EG[f, graph.count_E[f]] = g
        graph.place_GE[g, f] = graph.count_E[f]
        graph.count_E[f] += 1
        own, open_H = graph.score_GE[g, f], graph.open_GE[g]
        loss_H, via_H = graph.loss_NN[f], graph.via_NN[f]
        for h in range(num_columns):
            less = (own - open_H[h] < loss_H[h]) & (h != f)
            loss_H[h] = own - open_H[h] if less else loss_H[h]
            via_H[h] = g if less else via_H[h]
    if reopened or closed:
        for h in range(num_columns):
            if units_E[h] == 0:
                continue
            if closed and graph.via_NN[h, f] == g:
                graph.via_NN[h, f] = -1
            loss = graph.score_GE[g, h] - graph.open_GE[g, e]
            if reopened and h != e and loss < graph.loss_NN[h, e]:
                graph.loss_NN[h, e], graph.via_NN[h, e] = loss, g


@njit(cache=True, nogil=True)
def tied(graph, e, f, wanted, class_G, amount_G):
    """List classes that move from e to f at its loss, up to ``wanted`` units; returns (classes, units)."""
    num_classes = 0
    units = 0
    i = 0
    loss = graph.loss_NN[e, f]
    while units < wanted and i < graph.count_E[e]:
        g = np.int64(graph.member_EG[e, i])
        if graph.score_GE[g, e] - graph.open_GE[g, f] <= loss:
            class_G[num_classes] = g
            amount_G[num_classes] = min(
                wanted - units, graph.units_GE[g, e], graph.size_G[g] - graph.units_GE[g, f]
            )
            units += amount_G[num_classes]
            num_classes += 1
        i += 1
    return num_classes, units


@njit(cache=True, nogil=True)
def write_back(graph, class_n, indices_nK):
    """Hand the units of each class to its rows: its r-th row of s takes the units r, r + s, r + 2s, ...

    No column has more than s units of the class, so the units of a row lie on k different columns.
    """
    seen_G = np.zeros(graph.size_G.shape[0], np.int64)
    for t in range(class_n.shape[0]):
        g = class_n[t]
        wanted, units, slot = seen_G[g], 0, 0
        seen_G[g] += 1
        for e in range(graph.units_GE.shape[1]):
            units += graph.units_GE[g, e]
            while wanted < units:
                indices_nK[t, slot] = e
                slot += 1
                wanted += graph.size_G[g]
