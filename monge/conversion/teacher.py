"""What the dense model says about the training text: its last hidden states, kept in place of its logits.

Logits take V floats a token (49,152 for SmolLM2), hidden states H (576). So the dense model runs once over
the training text, leaves memory, and its logits are computed again from its head, step by step.

Shapes: N sequences of L tokens (B at a time), H model width, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from monge.conversion.observer import Observer, Silent
from monge.moe.compute.float32_products import fast_float32
from monge.workspace.writing import write_atomic

BATCH = 4  # sequences in a forward of the dense model
TOLERANCE = 1e-3  # of the logits' standard deviation
STATES = torch.float16  # rounding changes the teacher's distribution by a KL of 1e-7; bfloat16 by 1e-5


@dataclass(frozen=True)
class Head:
    """The way from last hidden states to logits: ``cap(scale (x W^T + b))``, cap(z) = c tanh(z / c) or z."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any, tokens_BL: Tensor | None = None) -> Head:
        """The head of a causal language model of transformers; its weights are shared, not copied.

        Args:
            tokens_BL: where given, the logits that come from `hidden_states` and this head are compared with
                the model's own on these tokens.

        Raises:
            ValueError: the model has no head, or does something between hidden states and logits that is
                unknown here, or its logits are not finite.
        """
        output = head_module(model)
        if not isinstance(output, nn.Linear):
            raise ValueError(
                f"{type(model).__name__} has no language-model head, so there is no text to train it on: "
                "leave fine-tuning out (minutes=0)"
            )
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        bias_V = None if output.bias is None else output.bias.detach()
        cap = getattr(config, "final_logit_softcapping", None)
        head = cls(output.weight.detach(), bias_V, scale, cap)
        if tokens_BL is not None:
            head._check(model, tokens_BL)
        return head

    @property
    def linear(self) -> bool:
        """Whether the logits are in proportion to the hidden states."""
        return self.bias_V is None and self.softcap is None

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """(T, H) -> (T, V)."""
        logits_TV = nn.functional.linear(hidden_TH, self.weight_VH, self.bias_V)
        if self.scale != 1:
            logits_TV = logits_TV * self.scale
        return logits_TV if self.softcap is None else torch.tanh(logits_TV / self.softcap) * self.softcap

    @torch.no_grad()
    def _check(self, model: nn.Module, tokens_BL: Tensor) -> None:
        tokens_BL = tokens_BL.to(self.weight_VH.device)
        theirs_TV = model(input_ids=tokens_BL, use_cache=False).logits.flatten(0, 1)
        if not torch.isfinite(theirs_TV).all():
            raise ValueError(
                f"the logits of {type(model).__name__} are NaN or infinite: its weights are damaged, or the "
                "conversion before this stage failed"
            )
        ours_TV = self.logits(hidden_states(model, tokens_BL).flatten(0, 1))
        error = ((ours_TV - theirs_TV).abs().max() / theirs_TV.std()).item()
        if not error <= TOLERANCE:
            raise ValueError(
                f"the logits of {type(model).__name__} do not follow from its last hidden states by a linear "
                f"head, scale and soft cap (they differ by {error:.2g} standard deviations), so it cannot be "
                "the teacher or the student of fine-tuning: leave it out (minutes=0)"
            )


def head_module(model: Any) -> nn.Module | None:
    """The language-model head of a transformers model, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def hidden_states(model: Any, tokens_BL: Tensor) -> Tensor:
    """(B, L, H), what the model hands to its head."""
    return model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class Teacher:
    """The dense model as fine-tuning sees it.

    Attributes:
        states_NLH: float16 hidden states of the training sequences, in their order.
        head: the dense model's.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from monge.conversion.teacher import Teacher
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> dense = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()
        >>> tokens = torch.randint(40, (3, 8))
        >>> teacher = Teacher.of(dense, tokens)
        >>> logits = teacher.head.logits(teacher.states_NLH[1].float())
        >>> torch.allclose(logits, dense(tokens[1:2]).logits[0], atol=1e-3)
        True
    """

    states_NLH: Tensor
    head: Head

    @classmethod
    def of(cls, model: nn.Module, chunks_NL: Tensor, observer: Observer | None = None) -> Teacher:
        """One pass of the dense model over the training sequences.

        Raises:
            ValueError: the model has no usable head (`Head.of`), or a hidden state is not a finite float16.
        """
        observer = observer or Silent()
        states: Tensor | None = None
        was_training = model.training
        model.eval()
        head = Head.of(model, chunks_NL[:1, :8])
        chunks_NL = chunks_NL.to(head.weight_VH.device)
        observer.stage("teacher", len(chunks_NL))
        for start in range(0, len(chunks_NL), BATCH):
            with torch.no_grad(), fast_float32():
                part_BLH = hidden_states(model, chunks_NL[start : start + BATCH]).to(STATES)
            if not torch.isfinite(part_BLH).all():
                raise ValueError(
                    f"hidden states of {type(model).__name__} on the training text are NaN or beyond "
                    f"{torch.finfo(STATES).max:g}: the checkpoint is damaged, or must be loaded as float32"
                )
            if states is None:
                states = part_BLH.new_empty((*chunks_NL.shape, part_BLH.shape[2]))
            states[start : start + BATCH] = part_BLH
            observer.advance(len(part_BLH))
        model.train(was_training)
        if states is None:
            raise ValueError("chunks_NL holds no sequence: name more text with --text")
        return cls(states, head)

    def save(self, path: Path) -> None:
        """Write the hidden states, whole or not at all; the head is the model's."""
        write_atomic(path, save({"states": self.states_NLH.cpu()}))

    @classmethod
    def load(cls, path: Path, head: Head) -> Teacher:
        """What `save` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            return cls(load_file(path)["states"].to(head.weight_VH.device), head)
        except Exception as error:
            raise ValueError(f"{path} cannot be used ({error}). Delete it to compute it again.") from error
