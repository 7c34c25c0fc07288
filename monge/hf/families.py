"""The standard architectures, as data: how each one turns logits into gates, and what that asks of a router.

    logits Z --> the method chooses --> the architecture's gates of the chosen (or the method's own)

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from monge.routing import ROUTERS, Router, router_options
from monge.routing.gates import gates_of

BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Family:
    """The gate of an architecture.

    Attributes:
        kind: "softmax" over all experts, or "sigmoid" of each.
        renormalise: True where the gates of the chosen always sum to one, else the name of the router's flag.
        scale: the attribute of the router that multiplies its gates, or None.
        bias: the buffer that is added to the scores to choose, the architecture's place for -b, or None.
    """

    kind: str
    renormalise: bool | str = True
    scale: str | None = None
    bias: str | None = None

    def renormalises(self, gate: nn.Module) -> bool:
        """Whether the gates of the chosen are divided by their sum."""
        return bool(getattr(gate, self.renormalise)) if isinstance(self.renormalise, str) else True

    def factor(self, gate: nn.Module) -> float:
        """What multiplies the gates."""
        return float(getattr(gate, self.scale)) if self.scale else 1.0

    def gates(self, gate: nn.Module, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """(T, K) what stock inference would weigh the chosen experts with, before `factor`."""
        chosen_TK = indices_TK.clamp(min=0)  # an empty slot: any expert, the caller sets its weight to zero
        return gates_of(logits_TE, chosen_TK, kind=self.kind, renormalise=self.renormalises(gate))


SOFTMAX = Family("softmax")
FLAGGED = Family("softmax", renormalise="norm_topk_prob")
SIGMOID = Family("sigmoid", renormalise="norm_topk_prob", scale="routed_scaling_factor", bias=BIAS)

FAMILIES: dict[str, Family] = {
    "MixtralTopKRouter": SOFTMAX,
    "Qwen2MoeTopKRouter": FLAGGED,
    "Qwen3MoeTopKRouter": FLAGGED,
    "OlmoeTopKRouter": FLAGGED,
    "DeepseekV3TopkRouter": SIGMOID,
    "Glm4MoeTopkRouter": SIGMOID,
    "GraniteMoeTopKRouter": SOFTMAX,  # a softmax over the chosen logits: the same as renormalising
    "GraniteMoeSharedTopKRouter": SOFTMAX,
}
"""Class of the router in transformers -> its gate."""

OWN_GATES = ("sigmoid", "base", "expert_choice", "hash")
"""Methods whose gates are their point, whatever the architecture's."""

FORBIDDEN = {
    "bias": "the architecture's router has no bias on its logits that could be saved",
    "device": "it follows the model",
    "dtype": "it follows the model",
}


def options_for(name: str, family: Family, gate: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The options of router ``name`` in this architecture: those given, and defaults that fit its gate.

    Raises:
        ValueError: an option that cannot be chosen here.
    """
    if name not in ROUTERS:
        raise ValueError(f"there is no router {name!r}; the routers are {', '.join(ROUTERS)}")
    for option, why in FORBIDDEN.items():
        if option in given:
            raise ValueError(f"the option {option!r} cannot be chosen for a transformers model: {why}")
    allowed = router_options(name)
    defaults: dict[str, Any] = {}
    if "renormalise" in allowed:
        defaults["renormalise"] = family.renormalises(gate)
    if name in ("lossfree", "quantile"):
        defaults["scores"] = family.kind
    if name == "prices" and family.bias and given.get("gates", "raw") == "raw":
        defaults |= {"gates": "raw", "scores": family.kind}
    return defaults | given


def gates_are_plain(router: Router, name: str, family: Family, prices: Tensor | None) -> bool:
    """Whether the architecture's own gates apply, because the method only chooses.

    ``prices``: of the `Routing`; SSR's plan and carried potentials come with them, plain routes do not.
    """
    if name == "ssr":
        return prices is None or router.gate_scores == "softmax"
    if name == "maxscore":
        return router.gate_form == "renormalised"
    if name == "prices":
        return router.gate_scores == "raw"
    if name == "noisy_topk":
        return not router.training_route
    return name not in OWN_GATES or name == family.kind


def holds_prices(router: Router, name: str, family: Family) -> bool:
    """Whether the architecture's bias can say what the router's prices say: top-k of sigmoid(Z) - b."""
    if not family.bias or name not in ("lossfree", "quantile", "prices"):
        return False
    return router.scores == family.kind and gates_are_plain(router, name, family, None)


def lost_in_stock(router: Router, name: str, family: Family) -> str | None:
    """What inference by transformers alone would leave out, in words; None if nothing."""
    if name == "hash":
        return "the hash table that chooses: it would route by frozen random weights instead"
    if holds_prices(router, name, family):
        return None
    lost = []
    if name in ("lossfree", "quantile", "prices") or getattr(router, "carry", False):
        lost.append("the prices b (it would choose by the scores alone, unbalanced)")
    elif getattr(router, "eval_prices", False):
        lost.append("the prices b of eval_prices=True")
    if not gates_are_plain(router, name, family, None) and name != "noisy_topk":
        lost.append(f"the gates of {name} (it would weigh the chosen by its own {family.kind} gates)")
    if name == "prices" and router.gate_scores == "priced":
        lost = ["the prices b, in the choice (it would be unbalanced) and in the gates"]
    return " and ".join(lost) or None
