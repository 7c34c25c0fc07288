"""`use_router`: any router of Monge inside the MoE models of transformers, trained there, saved for everyone.

    model (transformers) --> find its MoE blocks --> adapt each router --> the same model, routed by Monge

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from monge.hf.adapter import RouterAdapter, adapt, restore
from monge.hf.blocks import SparseBlock, find_blocks
from monge.hf.families import FAMILIES, holds_prices, lost_in_stock, options_for
from monge.hf.saving import attach_saving, detach_saving, load_state, stored_router
from monge.hf.tokens import announce, deliver
from monge.routing import make_router

Model = TypeVar("Model", bound=nn.Module)
HOOKS = "_monge_hooks"
OLDEST = (5, 21)  # of transformers


def use_router(model: Model, name: str, *, seed: int = 0, resume: bool = True, **options: Any) -> Model:
    """Let every MoE layer of a transformers ``model`` route by the router ``name``; the same model returns.

    The method chooses the experts. The gates stay the architecture's (softmax or sigmoid, renormalised or
    not, scaled) except where a method's gates are its point: SSR's transport plan on transport steps, priced
    gates of ``prices``, "soft_topk" and "annealed" of MaxScore, sigmoid, base, expert choice, hash, noisy
    top-k in training. The weight of the router stays the model's own parameter, and the checkpoint's keys and
    config stay as they are, so stock transformers loads it. What it would then leave out:

        nothing            topk, switch, noisy_topk, sbase, ssr, maxscore: at inference they are plain top-k
        nothing            lossfree, quantile, prices on DeepSeek-V3 and GLM4-MoE: there they choose on
                           sigmoid(Z) - b by default, and -b is saved as ``e_score_correction_bias``
        prices             the same on the other architectures, whose gate has no bias: b goes to
                           ``monge_state.safetensors`` beside the checkpoint
        gates              sigmoid, base, expert_choice; the experts themselves for hash

    `monge.hf.compare_with_stock` measures what that costs on your text; ``save_pretrained`` warns of it.
    ``monge.step(model)``, ``monge.aux_loss(model)`` and ``monge.watch(model)`` work on the model. Padding
    that ``attention_mask`` (B, S) marks fills no expert and counts in no statistic.

    On a model whose router limits tokens to groups of experts (``n_group``, DeepSeek-V3) the limit is lifted,
    in the config too. Where the method does not use ``e_score_correction_bias``, it becomes zero.

    Args:
        model: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3, GLM4-MoE, GraniteMoe or GraniteMoeShared,
            with a head or not, wrapped by PEFT or not. A model that already routes by Monge changes router.
        name: one of ``monge.routing.ROUTERS``.
        seed: of the decisions that all ranks share.
        resume: take prices and counters from the folder that the model was loaded from, if it was saved there
            with the same router.
        options: of the router, as in `monge.make_router`; by default those that fit the architecture.

    Raises:
        ValueError: no MoE layer, or one of an unknown architecture; an unknown router or option.
        ImportError: transformers is older than 5.21, where routers return other things.

    Examples:
        >>> import torch, monge
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> model = monge.hf.use_router(MixtralForCausalLM(config), "prices")
        >>> ids = torch.arange(24).view(2, 12)
        >>> model(ids, labels=ids).loss.backward(); monge.step(model)
        >>> "model.layers.0.mlp.gate.weight" in model.state_dict()
        True
    """
    blocks = _known_blocks(model)
    made = []
    for number, block in enumerate(blocks):  # everything that can fail, before anything changes
        gate = block.router
        family = _family_of(gate)
        chosen = options_for(name, family, gate, options)
        with torch.random.fork_rng(devices=[]):  # its initial weight is not used: no seed should notice
            router = make_router(
                name, dim=gate.weight.shape[1], num_experts=block.num_experts, top_k=block.top_k,
                layer=number, seed=seed, device=gate.weight.device, **chosen,
            )  # fmt: skip
        made.append((block, gate, router, family, chosen))
    folder = getattr(model, "name_or_path", None)
    stored = stored_router(folder) if resume and folder else None
    restore_router(model, missing_ok=True)
    for _, gate, router, family, _ in made:
        _tell_what_changes(gate, router, name, family)
        adapt(gate, router, family, name, {**options, "seed": seed})
    _lift_groups(model, [gate for _, gate, *_ in made])
    _hand_down_tokens(model, blocks)
    attach_saving(model)
    if folder and stored == name:
        load_state(model, folder)
    return model


def restore_router(model: Model, *, missing_ok: bool = False) -> Model:
    """Undo `use_router`: the model routes as transformers does, with the weights it has now.

    Raises:
        ValueError: the model does not route by Monge (unless ``missing_ok``).
    """
    gates = list(adapters(model))
    if not gates and not missing_ok:
        raise ValueError(f"{type(model).__name__} does not route by monge: call monge.hf.use_router first")
    for gate in gates:
        restore(gate)
    for module in model.modules():
        for hook in module.__dict__.pop(HOOKS, []):
            hook.remove()
        detach_saving(module)
    return model


def adapters(model: nn.Module) -> Iterator[RouterAdapter]:
    """The adapted routers inside ``model``, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, RouterAdapter))


def _known_blocks(model: nn.Module) -> list[SparseBlock]:
    blocks = find_blocks(model)
    known = ", ".join(name.removesuffix("TopKRouter").removesuffix("TopkRouter") for name in FAMILIES)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no MoE layers of transformers. use_router knows {known}; for a "
            "dense model see monge.hf.upcycle and monge.convert, for a layer of monge make_router"
        )
    for block in blocks:
        if _original(block.router) not in FAMILIES:
            raise ValueError(
                f"{block.name} routes by {_original(block.router)}, whose gate use_router does not know. It "
                f"knows {known}"
            )
    _check_version()
    return blocks


def _check_version() -> None:
    """Before transformers 5.21 Granite's router returned its indices first and its logits last."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    if (major, minor) < OLDEST:
        raise ImportError(
            f"use_router needs transformers {'.'.join(map(str, OLDEST))} or newer, not "
            f"{transformers.__version__}: pip install -U 'monge[hf]'"
        )


def _original(gate: nn.Module) -> str:
    cls = type(gate)
    return getattr(cls, "original", cls).__name__


def _family_of(gate: nn.Module) -> Any:
    return FAMILIES[_original(gate)]


def _tell_what_changes(gate: Any, router: Any, name: str, family: Any) -> None:
    if family.bias and getattr(gate, family.bias).any() and not holds_prices(router, name, family):
        warnings.warn(
            f"router {name!r} of layer {router.layer} does not use {family.bias}, which was not zero: it is "
            "zero from now on, so that stock inference chooses as this router does",
            stacklevel=3,
        )


def _lift_groups(model: Any, gates: list[Any]) -> None:
    limited = [gate for gate in gates if getattr(gate, "topk_group", 1) < getattr(gate, "num_group", 1)]
    if not limited:
        return
    warnings.warn(
        f"the limit of {limited[0].topk_group} of {limited[0].num_group} groups of experts per token is "
        "lifted, in the config too: the router chooses among all experts",
        stacklevel=3,
    )
    for gate in limited:
        gate.num_group = gate.topk_group = 1
    model.config.n_group = model.config.topk_group = 1


def _hand_down_tokens(model: nn.Module, blocks: list[SparseBlock]) -> None:
    """Hooks from each base model (whatever holds ``layers``) through the layers' attention to the routers."""
    for base_name in sorted({block.name.rpartition(".layers.")[0] for block in blocks}):
        base: Any = model.get_submodule(base_name)
        hooks = [base.register_forward_pre_hook(announce, with_kwargs=True)]
        for layer in base.layers:
            receivers = list(adapters(layer))
            hooks.append(layer.self_attn.register_forward_pre_hook(deliver(receivers), with_kwargs=True))
        base.__dict__[HOOKS] = hooks


def warn_of_stock(model: nn.Module) -> None:
    """Warn if inference by transformers alone would leave out something of the model's routing."""
    for gate in adapters(model):
        lost = lost_in_stock(gate.router, gate.method, gate.family)
        if lost is not None:
            warnings.warn(
                f"the checkpoint loads in stock transformers, which would leave out {lost}. With Monge, "
                "monge.hf.load_state(model, folder) restores it from monge_state.safetensors; "
                "monge.hf.compare_with_stock(model, batches) measures what leaving it out costs",
                stacklevel=3,
            )
            return
