"""What a token costs: parameters in total and active, the share of the FFN in use, FLOPs.

A weight that two modules share (tied embeddings) counts once. Of a mixture layer's experts ``top_k / E`` are
active; its router and shared experts always are, and so is everything outside.

Shapes: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from monge.conversion.ffn import find_ffns
from monge.conversion.on_disk import in_memory, layers_on_disk
from monge.hf.blocks import SparseBlock, find_blocks


@dataclass(frozen=True)
class Cost:
    """The cost of a token.

    Attributes:
        params_total: parameters of the model.
        params_active: parameters that a token uses.
        ffn_active: projections of the FFNs that a token uses, as share of those of the dense model, without
            the neurons that pad an expert.
        flops: floating-point operations of a token with ``context`` tokens before it: two per active weight
            of a matrix product, and ``4 context heads head_dim`` of attention in each layer.
        context: tokens that it attends to.
    """

    params_total: int
    params_active: int
    ffn_active: float
    flops: int
    context: int


def measure_cost(model: nn.Module, dense: nn.Module, *, context: int = 512) -> Cost:
    """Count the parameters of ``model``; ``dense`` is the model it was converted from, or itself.

    Raises:
        ValueError: the FFNs of ``dense`` cannot be found, or ``context`` is negative.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from monge.conversion.evaluation import measure_cost
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes))
        >>> cost = measure_cost(model, model)
        >>> cost.params_total == cost.params_active == 50 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
        True
    """
    if context < 0:
        raise ValueError(f"context must be a number of tokens, got {context}")
    blocks = find_blocks(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(_idle(block, dims=(2, 3)) for block in blocks)
    biases = sum(_stacked(block, dims=(2,)) for block in blocks)
    multiplied = _matrices(model) - _looked_up(model) - biases - sum(_idle(b, dims=(3,)) for b in blocks)
    shares = active_shares(model, dense)
    sizes = {ffn.layer: ffn.read().matrix_parameters for ffn in find_ffns(dense)}
    used = sum(shares[layer] * size for layer, size in sizes.items())
    flops = 2 * multiplied + context * _attention(model)
    return Cost(total, total - idle, used / sum(sizes.values()), flops, context)


def active_shares(model: nn.Module, dense: nn.Module) -> dict[int, float]:
    """Layer -> projections of its FFN that a token uses, as share of those of the dense FFN.

    This is the share of neurons in use. Neurons that only pad an expert to the size of the largest, or to one
    that a target needs, do not count here, though they cost parameters and FLOPs.
    """
    blocks = {block.layer: block for block in find_blocks(model)}
    modules, on_disk = dict(model.named_modules()), layers_on_disk(model)
    paths = {module: name for name, module in dense.named_modules()}
    shares = {}
    for ffn in find_ffns(dense):
        if ffn.layer in blocks:
            block = blocks[ffn.layer]
            layer = next((m for path, m in on_disk.items() if block.name.startswith(f"{path}.")), block.block)
            with in_memory(layer):
                used = _projections(block)
        else:  # dense, perhaps narrower
            places = {paths[ffn.input_module], paths[ffn.output_module]}
            used = sum(_matrices(modules[place]) for place in places if place in modules)
        shares[ffn.layer] = used / ffn.read().matrix_parameters
    return shares


def _stacked(block: SparseBlock, dims: tuple[int, ...]) -> int:
    """Parameters of all routed experts: stacked, matrices have three dimensions and biases two."""
    return sum(p.numel() for p in block.experts.parameters() if p.dim() in dims)


def _idle(block: SparseBlock, dims: tuple[int, ...]) -> int:
    """Those of them that a token leaves out."""
    return _stacked(block, dims) // block.num_experts * (block.num_experts - block.top_k)


def _projections(block: SparseBlock) -> float:
    """Weights of the projections of routed experts in use and of shared ones, without padding."""
    gates = [block.router, getattr(block.block, "shared_expert_gate", None)]
    apart = {id(p) for part in [block.experts, *gates] if part is not None for p in part.parameters()}
    modules = [block.block] if block.beside is None else [block.block, block.beside]
    shared = [p for module in modules for p in module.parameters() if p.dim() == 2 and id(p) not in apart]
    routed = [p for p in block.experts.parameters() if p.dim() == 3]
    return sum(map(_filled, shared)) + sum(map(_filled, routed)) * block.top_k / block.num_experts


def _filled(weight: Tensor) -> int:
    """Size without rows and columns that are zero throughout, which is how neurons pad an expert."""
    filled = weight.detach() != 0
    return int((filled.any(dim=-1).sum(dim=-1) * filled.any(dim=-2).sum(dim=-1)).sum())


def _matrices(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def _looked_up(model: nn.Module) -> int:
    """Weights of embeddings, which are not multiplied, unless they are the output projection too."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(table.numel() for table in tables if head is None or table is not head.weight)


def _attention(model: nn.Module) -> int:
    """FLOPs of attention per token attended to: scores and weighted sum, over all layers."""
    config = model.config
    heads = int(config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[union-attr, operator]
    return 4 * int(config.num_hidden_layers) * heads * int(head_dim)  # type: ignore[union-attr, arg-type]
