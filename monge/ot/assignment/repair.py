"""Exact repair: shortest augmenting paths over the columns, for the units a price ascent leaves unplaced.

With prices b that fit the assignment (every row holds a top-k of S_t - b) the reduced loss W[e,f] - b_e +
b_f of every arc is non-negative. So Dijkstra, from all overloaded columns at once, finds the cheapest path
to a column with room. Raising the price of every nearer column by the difference of the distances keeps all
reduced losses non-negative and makes those of the path 0: moving a unit along each of its arcs then leaves
rows and prices fitting each other, and changes only the loads at its two ends. When every load is right,
the assignment is optimal.

A path carries as many units as it can, by all the classes that tie on its arcs: many ties make few paths.

Shapes: G classes of equal rows, n rows, E columns, K choices per row, N nodes of the graph.
Source: Ahuja, Magnanti and Orlin, Network Flows (1993), section 9.7.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from monge.ot.assignment.graph import build, move, refresh, refresh_arc, tied, write_back

DONE, BEYOND_CUTOFF, NO_PATH, OUT_OF_WORK = range(4)


# Inlined, like ``move``: a call would count the references to the twelve arrays of a graph up and down.
@njit(inline="always")
def _settle(graph, e, nearest, price_N, bound_N, label_N, parent_N):
    """Try the arcs out of node e, which lies at ``nearest``; stale ones that might matter first."""
    num_nodes, num_columns = price_N.shape[0], graph.count_E.shape[0]
    if e < num_columns and not graph.fresh_E[e]:
        refresh(graph, e)
    loss_F, via_F = graph.loss_NN[e], graph.via_NN[e]
    base = nearest - price_N[e]
    stale = 0
    for f in range(num_columns):
        stale += (via_F[f] < 0) & (base + loss_F[f] + price_N[f] < bound_N[f])
    if 8 * stale > num_columns:
        refresh(graph, e)
    elif stale:
        for f in range(num_columns):
            if via_F[f] < 0 and base + loss_F[f] + price_N[f] < bound_N[f]:
                refresh_arc(graph, e, f)
    for f in range(num_nodes):
        # Rounding may leave a reduced loss just below 0.
        through = max(base + loss_F[f] + price_N[f], nearest)
        nearer = through < bound_N[f]
        bound_N[f] = through if nearer else bound_N[f]
        label_N[f] = through if nearer else label_N[f]
        parent_N[f] = e if nearer else parent_N[f]


@njit(inline="always")
def _shortest_path(graph, price_N, distance_N, bound_N, label_N, parent_N):
    """Dijkstra from every node with excess to the nearest one with room; returns that node, or -1.

    Only settled nodes get a distance. Until then it is kept twice, so that no loop has to ask which nodes are
    settled: as the bound to beat (then -inf) and as the label to pick the nearest by (then inf).
    """
    num_nodes = price_N.shape[0]
    for e in range(num_nodes):
        bound_N[e] = label_N[e] = 0.0 if graph.excess_N[e] > 0 else np.inf
        distance_N[e] = np.inf
        parent_N[e] = -1
    while True:
        e, nearest = num_nodes, np.inf
        for f in range(num_nodes):
            if label_N[f] < nearest:
                e, nearest = f, label_N[f]
        if e == num_nodes:
            return -1
        distance_N[e], bound_N[e], label_N[e] = nearest, -np.inf, np.inf
        if graph.excess_N[e] < 0:
            return e
        _settle(graph, e, nearest, price_N, bound_N, label_N, parent_N)


@njit(inline="always")
def _push(graph, parent_N, target, class_G, amount_G):
    """Move as many units as the path to ``target`` carries; returns how many."""
    num_columns = graph.count_E.shape[0]
    source = target
    while parent_N[source] >= 0:
        source = parent_N[source]
    width, f = min(graph.excess_N[source], -graph.excess_N[target]), target
    while f != source:
        e = parent_N[f]
        if f == num_columns:
            width = min(width, graph.free_E[e])
        elif e < num_columns and width > 1:
            width = min(width, tied(graph, e, f, width, class_G, amount_G)[1])
        f = e
    graph.excess_N[source] -= width
    graph.excess_N[target] += width
    f = target
    while f != source:
        # A move towards the target only opens places for the moves behind it.
        e = parent_N[f]
        if f == num_columns:
            graph.free_E[e] -= width
            if graph.free_E[e] == 0:
                graph.loss_NN[e, f] = np.inf
        elif e == num_columns:
            graph.free_E[f] += width
            graph.loss_NN[f, e] = 0.0
        else:
            num_classes, class_G[0], amount_G[0] = 1, graph.via_NN[e, f], 1
            if width > 1 or class_G[0] < 0:
                num_classes, _ = tied(graph, e, f, width, class_G, amount_G)
            for i in range(num_classes):
                move(graph, class_G[i], e, f, amount_G[i])
        f = e
    return width


@njit(cache=True, nogil=True)
def _augment(graph, price_N, start_N, cutoff, work, limit):
    """Cheapest paths until every load fits; see ``repair``."""
    num_nodes, num_classes = price_N.shape[0], graph.size_G.shape[0]
    distance_N, bound_N, label_N = np.empty(num_nodes), np.empty(num_nodes), np.empty(num_nodes)
    parent_N = np.empty(num_nodes, np.int64)
    class_G, amount_G = np.empty(num_classes, np.int64), np.empty(num_classes, np.int64)
    left, reach = 0, 0.0
    for e in range(num_nodes):
        left += max(0, graph.excess_N[e])
    while left > 0:
        if work >= limit:
            return OUT_OF_WORK, work, reach
        work += 1
        target = _shortest_path(graph, price_N, distance_N, bound_N, label_N, parent_N)
        if target < 0:
            return NO_PATH, work, np.inf
        lowest, highest = np.inf, -np.inf
        for e in range(num_nodes):
            shift = price_N[e] - start_N[e] + max(0.0, distance_N[target] - distance_N[e])
            lowest, highest = min(lowest, shift), max(highest, shift)
        reach = highest - lowest
        if reach > cutoff:
            return BEYOND_CUTOFF, work, reach
        for e in range(num_nodes):
            price_N[e] += max(0.0, distance_N[target] - distance_N[e])
        left -= _push(graph, parent_N, target, class_G, amount_G)
    return DONE, work, reach


@njit(cache=True, nogil=True)
def repair(score_GE, class_n, size_G, indices_nK, price_N, start_N, free_E, excess_N, cutoff, work, limit):
    """Move units along cheapest paths until every load fits; returns (how it ended, paths searched, reach).

    ``indices_nK``, ``price_N``, ``free_E`` and ``excess_N`` change in place; ``work`` paths were searched
    before. The n rows may be a part of all: those whose gap at the prices ``start_N`` is at most
    ``cutoff``. The others keep their columns as long as no price difference has moved by more, which is
    made sure of: the search ends BEYOND_CUTOFF before the first path that would; ``reach`` is the movement
    which that path asks for.
    """
    graph = build(score_GE, class_n, size_G, indices_nK, free_E, excess_N)
    ended, work, reach = _augment(graph, price_N, start_N, cutoff, work, limit)
    write_back(graph, class_n, indices_nK)
    return ended, work, reach
