"""`audit`: run a model over text in several ways and compare the routes.

    as it is          loads, entropy, domains, drops, duplicates, loss
    one expert more or less, the other precision, every sequence alone, another second half

Shapes: B sequences of S tokens, Q sequences in all, E experts, H model width, L mixture layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monge.auditing.findings import AuditReport, LayerAudit
from monge.auditing.measures import duplicates_of, information_of, output_differences
from monge.auditing.routes import changed, mixture_layers, outputs_of_all, recorded, routes_of, run
from monge.hf import compare_with_stock
from monge.hf.adapter import RouterAdapter
from monge.hf.blocks import SparseBlock, possible_offsets, shifted_top_k
from monge.moe.dispatch import capacity_of
from monge.routing import Router, training_routes

SAMPLE = 32  # tokens on which experts are compared with each other
CHECKED = 16  # sequences of the checks that run them anew

Batches = Sequence[Tensor] | Mapping[str, Sequence[Tensor]]


@dataclass
class _Layer:
    """Sums over the first pass."""

    loads: list[Tensor] = field(default_factory=list)  # (B, E) of every batch
    dropped: dict[float, float] = field(default_factory=dict)
    entropy: float | None = None
    sample: list[Tensor] = field(default_factory=list)


def audit(
    model: nn.Module,
    batches: Batches,
    *,
    capacity_factors: Sequence[float] = (1.0, 1.25),
    precision: bool = True,
    observer: Callable[[str, int, int], None] | None = None,
) -> AuditReport:
    """Ask any Mixture-of-Experts language model what its routing does.

    Loads, dead and duplicate experts, entropy, specialisation by text domain, what a static capacity would
    drop, route flips between float32 and bfloat16, dependence on the batch and on later tokens, quality with
    one expert less and one more per token. `LayerAudit` says what each figure is. The model is measured in
    evaluation mode, and left as it was.

    Sequences must be free of padding. The last checks run up to 16 sequences again (at most half of all),
    spread over the domains.
    Running a sequence alone multiplies matrices of other shapes, whose rounding can flip a tie: of a router
    that looks at single tokens, a batch dependence of some 1e-5 means nothing.

    Args:
        model: a causal language model called with ``input_ids=``; transformers' own, changed by
            `monge.hf.use_router`, or with `monge.MoE` layers.
        batches: (B, S) int64 token ids each, S at least 2, at least two sequences in all; or domain -> such
            batches, to measure specialisation. A batch is what a static capacity would be filled from.
        capacity_factors: for ``drops``.
        precision: compare with the same model in bfloat16 (in float32 if it is not float32 now), of which a
            copy is made.
        observer: called with (stage, done, total).

    Raises:
        ValueError: no mixture layers, no or unfit batches, or a capacity factor that is not positive.

    Examples:
        >>> import torch, monge
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> model = MixtralForCausalLM(config)
        >>> low, high = torch.arange(16).view(2, 8), torch.arange(16, 32).view(2, 8)
        >>> report = monge.audit(model, {"low": [low], "high": [high]})
        >>> len(report.layers), sum(report.layers[0].load), report.layers[0].leak
        (2, 64, 0.0)
    """
    blocks = mixture_layers(model)
    named = _checked(batches, capacity_factors)
    tell = observer or (lambda stage, done, total: None)
    state = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return _audit(model, blocks, named, tuple(capacity_factors), precision, tell)
    finally:
        for module, training in state.items():
            module.training = training


def _audit(
    model: Any,
    blocks: list[SparseBlock],
    named: dict[str, list[Tensor]],
    factors: tuple[float, ...],
    precision: bool,
    tell: Callable[[str, int, int], None],
) -> AuditReport:
    every = [(number, batch) for number, batches in enumerate(named.values()) for batch in batches]
    layers = [_Layer(dropped=dict.fromkeys(factors, 0.0)) for _ in blocks]
    sums = torch.zeros(len(named), 2, dtype=torch.float64)
    for done, (number, ids_BS) in enumerate(every, start=1):
        with recorded(blocks) as routes:
            loss, count = run(model, ids_BS)
        sums[number] += torch.tensor([float(loss), count], dtype=torch.float64)
        for index, layer in enumerate(layers):
            _add(layer, routes.tables[index], routes.hidden[index], routes.entropies.get(index), ids_BS)
        tell("routes", done, len(every))
    losses = {0: float(sums[:, 0].sum() / sums[:, 1].sum())}
    for offset in possible_offsets(model, (-1, 1)):
        with shifted_top_k(model, offset):
            losses[offset] = _mean_loss(model, [ids for _, ids in every])
        tell(f"{offset:+d} expert", 1, 1)

    domains_Q = torch.cat([torch.full((len(ids),), number) for number, ids in every])
    checked_QS, others_QS = _spread(named)
    changes = _changes(model, blocks, checked_QS, others_QS, precision, tell)
    parts = [checked_QS[i : i + 4] for i in range(0, len(checked_QS), 4)]
    adapted = any(isinstance(module, RouterAdapter) for module in model.modules())
    stock = compare_with_stock(model, parts) if adapted else None
    tokens = sum(ids.numel() for _, ids in every)
    found = [
        _of_layer(block, layer, tokens, domains_Q, len(named), changes.of(index))
        for index, (block, layer) in enumerate(zip(blocks, layers))
    ]
    return AuditReport(
        layers=tuple(found),
        tokens=tokens,
        sequences=len(domains_Q),
        domains={name: float(sums[i, 0] / sums[i, 1]) for i, name in enumerate(named)},
        losses=dict(sorted(losses.items())),
        precision=changes.precision,
        loss_precision=changes.loss_precision,
        loss_checked=_mean_loss(model, parts),
        loss_stock=stock.loss_stock if stock else None,
    )


def _of_layer(
    block: SparseBlock, layer: _Layer, tokens: int, domains_Q: Tensor, domains: int, changes: dict[str, Any]
) -> LayerAudit:
    loads_QE = torch.cat(layer.loads)
    sample_NH = torch.cat(layer.sample)[:SAMPLE]
    differences_EE = output_differences(outputs_of_all(block.experts, sample_NH, block.num_experts).cpu())
    information = information_of(loads_QE, domains_Q, domains) if domains > 1 else (None, None)
    slots = max(float(loads_QE.sum()), 1)
    return LayerAudit(
        layer=block.layer,
        name=block.name,
        num_experts=block.num_experts,
        top_k=block.top_k,
        load=loads_QE.sum(0).tolist(),
        routing_entropy=layer.entropy / tokens if layer.entropy is not None else None,
        duplicates=duplicates_of(differences_EE),
        closest=float(differences_EE.min()),
        information=information[0],
        information_chance=information[1],
        drops={factor: dropped / slots for factor, dropped in layer.dropped.items()},
        **changes,
    )


def _add(layer: _Layer, table_TE: Tensor, hidden_TH: Tensor, entropy: Tensor | None, ids_BS: Tensor) -> None:
    loads_BE = table_TE.unflatten(0, ids_BS.shape).sum(1).cpu()
    layer.loads.append(loads_BE)
    loads_E = loads_BE.sum(0)
    for factor in layer.dropped:
        capacity = capacity_of(int(loads_E.sum()), len(loads_E), factor)
        layer.dropped[factor] += float((loads_E - capacity).clamp(min=0).sum())
    if entropy is not None:
        layer.entropy = (layer.entropy or 0.0) + float(entropy)
    if sum(map(len, layer.sample)) < SAMPLE:
        stride = max(1, len(hidden_TH) // (SAMPLE // 2))
        layer.sample.append(hidden_TH[::stride][: SAMPLE // 2].clone())


@dataclass
class _Changes:
    shares: dict[str, list[float]]
    precision: str | None = None
    loss_precision: float | None = None

    def of(self, index: int) -> dict[str, float | None]:
        """Of one layer; None where it was not measured."""
        return {name: values[index] if values else None for name, values in self.shares.items()}


def _changes(
    model: Any,
    blocks: list[SparseBlock],
    ids_QS: Tensor,
    others_QS: Tensor,
    precision: bool,
    tell: Callable[[str, int, int], None],
) -> _Changes:
    """Shares of the slots of every layer that change when something else does."""
    found = _Changes({"flips": []})
    ours = any(isinstance(module, Router) for module in model.modules())
    half = ids_QS.shape[1] // 2
    # Of other sequences: the same ones in another order are the same batch to a method that balances it.
    spliced_QS = torch.cat([ids_QS[:, :half], others_QS[:, half:]], dim=1)
    for suffix, context in (("", nullcontext), ("_training", lambda: training_routes(model))):
        shares: dict[str, list[float]] = {"batch_dependence": [], "leak": []}
        if not suffix or ours:
            with context():
                together = routes_of(model, blocks, ids_QS)
                other = routes_of(model, blocks, spliced_QS)
                alone = [routes_of(model, blocks, one[None]) for one in ids_QS]
            for index, table in enumerate(together):
                apart = torch.cat([routes[index] for routes in alone])
                shares["batch_dependence"].append(_share(table, apart))
                shares["leak"].append(_share(table[:, :half], other[index][:, :half]))
        found.shares |= {name + suffix: values for name, values in shares.items()}
        tell("batch and future" + suffix.replace("_", ", "), 1, 1)
    if precision:
        now = next(model.parameters()).dtype
        dtype = torch.bfloat16 if now == torch.float32 else torch.float32
        other_model = copy.deepcopy(model).to(dtype)
        pairs = zip(
            routes_of(model, blocks, ids_QS), routes_of(other_model, mixture_layers(other_model), ids_QS)
        )
        found.shares["flips"] = [_share(*pair) for pair in pairs]
        found.precision = str(dtype).removeprefix("torch.")
        found.loss_precision = _mean_loss(other_model, [ids_QS[i : i + 4] for i in range(0, len(ids_QS), 4)])
        tell(f"in {found.precision}", 1, 1)
    return found


def _share(before: Tensor, after: Tensor) -> float:
    different, slots = changed(before, after)
    return different / max(slots, 1)


def _mean_loss(model: Any, batches: Sequence[Tensor]) -> float:
    runs = [run(model, ids) for ids in batches]
    return sum(float(loss) for loss, _ in runs) / sum(count for _, count in runs)


def _spread(named: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Twice (Q, S): sequences for the checks and as many others, of equal length, domains in turn."""
    queues = [[one for batch in batches for one in batch] for batches in named.values()]
    length = min(len(one) for queue in queues for one in queue)
    chosen = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    count = min(CHECKED, len(chosen) // 2)
    chosen_QS = torch.stack([one[:length] for one in chosen[: 2 * count]])
    return chosen_QS[:count], chosen_QS[count:]


def _checked(batches: Batches, factors: Sequence[float]) -> dict[str, list[Tensor]]:
    named = dict(batches) if isinstance(batches, Mapping) else {"text": batches}
    found = {name: list(some) for name, some in named.items()}
    for name, some in found.items():
        if not some:
            raise ValueError(f"domain {name!r} has no batches: leave it out, or give it text")
        for ids in some:
            if ids.dim() != 2 or ids.shape[1] < 2 or ids.is_floating_point():
                raise ValueError(
                    f"batches of domain {name!r} must be (B, S) token ids with S at least 2, got "
                    f"{tuple(ids.shape)} of {ids.dtype}"
                )
    if sum(len(ids) for some in found.values() for ids in some) < 2:
        raise ValueError("an audit needs at least two sequences: it replaces the end of one by another's")
    for factor in factors:
        if not 0 < factor < float("inf"):
            raise ValueError(f"capacity_factors must be positive, got {factor}")
    return found
