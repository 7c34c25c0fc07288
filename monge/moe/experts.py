"""The weights of the experts, stacked as transformers stacks them, and the shared expert beside them.

Shapes: T tokens, K slots per token, E experts, H model width, I expert width, S shared width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute import PATHS, choose_path
from monge.moe.exchange import Exchange, local_part

INIT_STD = 0.02  # transformers' initializer_range


def apply_experts(
    hidden_TH: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    proj_in_EJH: Tensor,
    proj_out_EHI: Tensor,
    activation: str,
    bias_EJ: Tensor | None = None,
    *,
    compute: str = "auto",
    exchange: Exchange | None = None,
) -> Tensor:
    """(T, H), a compute path on anyone's weights: see `ComputePath`, and `Experts` for the rest.

    With an ``exchange`` the weights are those of this rank's experts, and tokens travel to the others'.
    """
    device = hidden_TH.device
    if torch.is_autocast_enabled(device.type) and hidden_TH.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        hidden_TH, proj_in_EJH, proj_out_EHI = (x.to(dtype) for x in (hidden_TH, proj_in_EJH, proj_out_EHI))
        bias_EJ = bias_EJ.to(dtype) if bias_EJ is not None else None
    if hidden_TH.dtype != proj_in_EJH.dtype:
        raise TypeError(
            f"hidden states are {hidden_TH.dtype} and the experts {proj_in_EJH.dtype}: convert one of them "
            "(`.to(dtype)`), or run under torch.autocast"
        )
    if exchange is not None:
        return exchange.experts(
            hidden_TH, indices_TK, weights_TK, proj_in_EJH, proj_out_EHI, activation, bias_EJ, compute
        )
    if compute == "auto":
        compute = choose_path(indices_TK.shape, proj_out_EHI.shape, hidden_TH.dtype, device)
    return PATHS[compute](hidden_TH, indices_TK, weights_TK, proj_in_EJH, proj_out_EHI, activation, bias_EJ)


class Experts(nn.Module):
    """E feed-forward networks: ``expert_e(x) = act(x A_e^T + a_e) D_e^T``; a is there if ``bias``.

    Weights (names and layout of transformers' experts, so that state dicts interchange):
        gate_up_proj: (E, 2I, H), for the gated activations: ``act = f(gate) * up``, gate rows first.
        up_proj: (E, I, H) instead, for the ungated ones.
        down_proj: (E, H, I).
        gate_up_proj_bias: (E, 2I), or up_proj_bias (E, I), if ``bias``. A bias of the output would be the
            same for every expert of a dense layer that was divided: it is `MoE.bias`.

    Args:
        dim: H. hidden: I. num_experts: E.
        activation: a name in `monge.moe.activations.ACTIVATIONS`. Gated: "swiglu" (SiLU), "geglu" (GELU in
            its tanh approximation, as Gemma), "geglu_exact". No gate: "gelu" (exact, as BERT and ViT),
            "gelu_tanh" (as GPT-2), "relu".
        bias: add a bias to the input projection; it starts at zero.
        compute: a name in `monge.moe.compute.PATHS`, or "auto", a fixed table.

    Memory: a forward that will be differentiated saves, of its activations,
    ``T H b + R J b + T K (8 + w)`` bytes: the hidden states, the pre-activations (J = 2I gated, I not), and
    the indices and gates. b and w are the bytes of an element of the hidden states and of the gates; R is the
    number of filled slots, T K where it is not read from the device (under torch.compile, `grouped_mm` on an
    accelerator), or E T (`masked`). The first term falls away when the input projection is frozen. Weights
    are not counted; under autocast their casts, ``E H (J + I) b`` bytes, are saved as well.
    """

    down_proj: nn.Parameter
    exchange: Exchange | None = None
    """How tokens reach experts on other ranks; set by `monge.moe.parallel.shard_experts`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        compute: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if compute != "auto" and compute not in PATHS:
            raise ValueError(f"compute must be auto or one of {', '.join(PATHS)}; got {compute!r}")
        self.dim, self.hidden, self.num_experts = dim, hidden, num_experts
        self.activation, self.compute = activation, compute
        act = ACTIVATIONS[activation]
        self.input_name = "gate_up_proj" if act.gated else "up_proj"
        shapes = {self.input_name: (act.width(hidden), dim), "down_proj": (dim, hidden)}
        for name, shape in shapes.items():
            weight = torch.empty((num_experts, *shape), device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.bias_name = f"{self.input_name}_bias" if bias else None
        if self.bias_name:
            zeros = torch.empty((num_experts, act.width(hidden)), device=device, dtype=dtype)
            self.register_parameter(self.bias_name, nn.Parameter(zeros))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every weight from N(0, 0.02^2); biases start at zero."""
        for name, weight in self.named_parameters():
            if name == self.bias_name:
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=INIT_STD)

    def forward(self, hidden_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, H): ``out_t = sum_k weights_tk * expert_{indices_tk}(hidden_t)``; empty slots (-1) add nothing.

        Matrix products run in the dtype of the inputs (of autocast inside it), the sum over slots in float32
        at least.

        Raises:
            TypeError: hidden states and weights differ in dtype, outside autocast.
        """
        bias: Tensor | None = getattr(self, self.bias_name) if self.bias_name else None
        proj_in: Tensor = getattr(self, self.input_name)
        proj_out: Tensor = self.down_proj
        if self.exchange is not None:  # DTensors, of which this rank holds its experts
            proj_in, proj_out = local_part(proj_in), local_part(proj_out)
            bias = None if bias is None else local_part(bias)
        return apply_experts(
            hidden_TH,
            indices_TK,
            weights_TK,
            proj_in,
            proj_out,
            self.activation,
            bias,
            compute=self.compute,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden={self.hidden}, num_experts={self.num_experts}, "
            f"activation={self.activation!r}, compute={self.compute!r}"
        )


class SharedExpert(nn.Module):
    """One dense feed-forward network that every token takes, with gate 1: ``act(x A^T + a) D^T``.

    Weights as in transformers' GraniteMoeShared: ``input_linear.weight`` (2S, H), or (S, H) for the ungated
    activations, gate rows first, and ``output_linear.weight`` (H, S). ``input_linear.bias`` if ``bias``.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        width = ACTIVATIONS[activation].width(hidden)
        self.input_linear = nn.Linear(dim, width, bias=bias, device=device, dtype=dtype)
        self.output_linear = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)
        for linear in (self.input_linear, self.output_linear):
            nn.init.normal_(linear.weight, std=INIT_STD)
        if bias:
            nn.init.zeros_(self.input_linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        act = ACTIVATIONS[self.activation]
        pre = self.input_linear(hidden)
        if not act.gated:
            return self.output_linear(act.function(pre))
        gate, up = pre.chunk(2, dim=-1)
        return self.output_linear(act.function(gate) * up)
