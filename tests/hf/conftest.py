"""The marks that transformers' own tests bear: known, so that its mixins can be imported."""

from __future__ import annotations

THEIRS = (
    "accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "order",
    "torch_compile_test",
)  # fmt: skip


def pytest_configure(config):
    for name in THEIRS:
        config.addinivalue_line("markers", f"{name}: of transformers")
