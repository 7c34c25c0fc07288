"""The tests that transformers has for every model of its own, on models that route by Monge."""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch
import transformers
from hf_models import FAMILIES, SIZES, tokens
from shipped_mixins import FOLDER, model_tester_mixin

import monge

pytestmark = pytest.mark.slow

if not FOLDER.is_dir():
    pytest.skip(f"no {FOLDER}: `make test` unpacks it there", allow_module_level=True)

ROUTERS = ("prices", "maxscore", "ssr")  # one after the other, family by family
NOT_OURS = (
    "test_generation_tester_mixin_inheritance",  # the tests of generation are not shipped
    "test_init_weights_can_init_buffers",  # asks for a router in a model without weights: it comes after them
)


def routed(family: str, router: str) -> type:
    """The family's class, whose models route by Monge as soon as they have their weights."""
    base = getattr(transformers, f"{family}ForCausalLM")

    class Routed(base):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            if not any(parameter.is_meta for parameter in self.parameters()):
                monge.hf.use_router(self, router)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            found = base.from_pretrained(*args, **kwargs)
            monge.hf.use_router(found[0] if isinstance(found, tuple) else found, router)
            return found

    Routed.__name__, Routed.__module__ = base.__name__, base.__module__  # its tables go by them
    return Routed


class ModelTester:
    """What the mixin asks for the sizes and inputs of a model."""

    batch_size, seq_length, is_training = 3, 10, True
    hidden_size, num_hidden_layers, num_attention_heads = (
        SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )

    def __init__(self, family: str) -> None:
        self.family = family

    def get_config(self) -> Any:
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return getattr(transformers, f"{self.family}Config")(**SIZES | FAMILIES[self.family] | special)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = tokens(self.batch_size, self.seq_length).clamp_min(3)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _cases() -> Any:
    mixin = model_tester_mixin()
    for i, family in enumerate(FAMILIES):
        router = ROUTERS[i % len(ROUTERS)]
        members = {
            "setUp": lambda self, family=family: setattr(self, "model_tester", ModelTester(family)),
            "all_model_classes": (routed(family, router),),
            "test_all_params_have_gradient": False,  # an expert that no token took has none
            **dict.fromkeys(NOT_OURS),
        }
        name = f"Test{family}With{router.title()}"
        yield name, type(name, (mixin, unittest.TestCase), members)


globals().update(_cases())
