"""The columns of the table of conversions."""

from __future__ import annotations

from monge.viz.columns import Column
from monge.viz.numbers import MISSING, count, figure, percent

COLUMNS: tuple[Column, ...] = (
    Column(
        "experts",
        "Routed experts that a token uses, of those there are. A shared expert, which every token uses, "
        "counts in the active shares only.",
        lambda row: row["experts"] or MISSING,
    ),
    Column(
        "FFN active",
        "Share of the model's FFN neurons that a token uses, layers that stayed dense included.",
        lambda row: percent(row["ffn_active"]),
    ),
    Column(
        "all active",
        "Parameters that a token uses, as share of all parameters of the dense model.",
        lambda row: percent(row["active"]),
    ),
    Column(
        "tuning steps",
        "Optimizer steps of fine-tuning after the closed form.",
        lambda row: count(row["steps"]),
    ),
    Column(
        "perplexity",
        "On held-out text, lower is better.",
        lambda row: figure(row["perplexity"]),
    ),
    Column(
        "ratio",
        "Perplexity over that of the dense model in the same run and on the same text, ± one standard "
        "deviation over seeds.",
        lambda row: figure(row["ratio"], row.get("ratio_std")),
    ),
    Column(
        "KL",
        "Kullback-Leibler divergence from the dense model's predictions in nats per token: 0 is the same "
        "model. Adaptation to the text lowers the perplexity, but not this.",
        lambda row: figure(row["kl"]),
    ),
    Column(
        "agreement",
        "Share of tokens for which both models' first choice is the same.",
        lambda row: percent(row["agreement"]),
    ),
    Column(
        "cosine",
        "Between the embeddings of the dense and the converted encoder, mean over held-out sequences.",
        lambda row: figure(row["cosine"], row.get("cosine_std")),
    ),
    Column(
        "seconds",
        "Wall time of the start that finished the conversion, its evaluation and export included.",
        lambda row: MISSING if row["seconds"] is None else count(round(row["seconds"])),
    ),
)
