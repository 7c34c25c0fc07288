"""The non-linearities of an expert, forward and backward, as plain functions on rows.

A compute path keeps the pre-activations and recomputes the rest in its backward, so each activation comes as
a pair of functions instead of an autograd graph.

Shapes: n rows, I expert width, J = 2 I when the activation is gated (gate first, then up), else I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monge.moe.activation_kernels import gated_backward, swiglu_backward
from monge.moe.cpu_kernels import as_array


@dataclass(frozen=True)
class Activation:
    """``function``, applied to the gate half (gated) or to everything, and its
    ``derivative(grad, x, grad_input=out)``.
    """

    gated: bool
    function: Callable[[Tensor], Tensor]
    derivative: Callable[..., Tensor]

    def width(self, hidden: int) -> int:
        """J, the rows of an expert's input projection, for an expert of width I = ``hidden``."""
        return 2 * hidden if self.gated else hidden

    def forward(self, pre_nJ: Tensor) -> Tensor:
        """(n, I): ``function(gate) * up`` when gated, else ``function(pre)``."""
        if not self.gated:
            return self.function(pre_nJ)
        gate_nI, up_nI = pre_nJ.chunk(2, dim=-1)
        return self.function(gate_nI).mul_(up_nI)

    def backward(self, grad_nI: Tensor, weights_n1: Tensor, pre_nJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate ``sum_n weights_n <grad_n, a_n>`` with a = forward(pre); ``grad_nI`` is overwritten.

        Returns the gradient of the weights (n, 1), the weighted activations ``weights * a`` (n, I), which the
        gradient of the output projection is made of, and the gradient of ``pre`` (n, J).
        """
        if not self.gated:
            act_nI = self.function(pre_nJ)
            grad_weights_n1 = _dot(grad_nI, act_nI, weights_n1.dtype)
            grad_pre_nJ = torch.empty_like(pre_nJ)
            self.derivative(grad_nI.mul_(weights_n1), pre_nJ, grad_input=grad_pre_nJ)
            return grad_weights_n1, act_nI.mul_(weights_n1), grad_pre_nJ
        gate_nI, up_nI = pre_nJ.chunk(2, dim=-1)
        grad_pre_nJ = torch.empty_like(pre_nJ)
        if self.function is F.silu and _compiled(weights_n1, pre_nJ, grad_nI):
            act_nI, grad_weights_n1 = torch.empty_like(grad_nI), torch.zeros_like(weights_n1)
            weights_n, grad_weights_n = as_array(weights_n1[:, 0]), as_array(grad_weights_n1[:, 0])
            pre, grad, act, grad_pre = map(as_array, (pre_nJ, grad_nI, act_nI, grad_pre_nJ))
            swiglu_backward(weights_n, pre, grad, 0, act.shape[1], act, grad_pre, grad_weights_n)
            return grad_weights_n1, act_nI, grad_pre_nJ
        act_nI = self.function(gate_nI)
        grad_gate_nI, grad_up_nI = grad_pre_nJ.chunk(2, dim=-1)
        if _compiled(weights_n1, pre_nJ, act_nI, grad_nI):  # one pass over memory instead of eight
            grad_weights_n1 = torch.empty_like(weights_n1)
            tensors = (weights_n1[:, 0], pre_nJ, act_nI, grad_nI, grad_pre_nJ, grad_weights_n1[:, 0])
            gated_backward(*(as_array(tensor) for tensor in tensors))
        else:
            torch.mul(grad_nI, act_nI, out=grad_up_nI).mul_(weights_n1)
            act_nI.mul_(up_nI)
            grad_weights_n1 = _dot(grad_nI, act_nI, weights_n1.dtype)
            act_nI.mul_(weights_n1)
            grad_nI.mul_(up_nI).mul_(weights_n1)
        self.derivative(grad_nI, gate_nI, grad_input=grad_gate_nI)
        return grad_weights_n1, act_nI, grad_pre_nJ


def _compiled(weights: Tensor, *values: Tensor) -> bool:
    """Whether the compiled loop takes them: rows in one piece and of one dtype, or bfloat16 by float32."""
    whole = all(tensor.is_contiguous() for tensor in (weights, *values))
    dtypes, wide = {value.dtype for value in values}, {weights.dtype}
    fit = wide in ({torch.float32}, {torch.float64}) and dtypes == wide
    fit = fit or (dtypes == {torch.bfloat16} and wide == {torch.float32})
    return weights.device.type == "cpu" and whole and fit


def _dot(a_nI: Tensor, b_nI: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 1), <a, b> of every row, multiplied and summed in ``dtype``."""
    return (a_nI.to(dtype) * b_nI).sum(dim=-1, keepdim=True)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, x: Tensor, *, grad_input: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh", grad_input=grad_input)


def _relu_backward(grad: Tensor, x: Tensor, *, grad_input: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, x, 0, grad_input=grad_input)


ACTIVATIONS: dict[str, Activation] = {
    # silu(gate) * up: Llama, Mixtral, Qwen, DeepSeek
    "swiglu": Activation(True, F.silu, torch.ops.aten.silu_backward),
    # tanh-approximated gelu(gate) * up: Gemma
    "geglu": Activation(True, _gelu_tanh, _gelu_tanh_backward),
    # exact (erf) gelu(gate) * up
    "geglu_exact": Activation(True, F.gelu, torch.ops.aten.gelu_backward),
    # exact (erf) gelu, no gate: BERT, ViT
    "gelu": Activation(False, F.gelu, torch.ops.aten.gelu_backward),
    # tanh-approximated gelu, no gate: GPT-2
    "gelu_tanh": Activation(False, _gelu_tanh, _gelu_tanh_backward),
    # relu, no gate: OPT, T5; its derivative at 0 is 0
    "relu": Activation(False, F.relu, _relu_backward),
}
