"""Monge inside the MoE models of transformers: routers, their state beside a checkpoint, compute paths.

`use_router` changes the router of a model, `load_state` restores a saved one, `compare_with_stock` measures
what inference without Monge would leave out. `use_experts` computes the experts by Monge's
paths. Nothing here imports transformers before it is needed.
"""

from typing import TYPE_CHECKING, Any

from monge.hf.experts import register_experts, use_experts
from monge.hf.logs import RouterLog
from monge.hf.router import restore_router, use_router
from monge.hf.saving import load_state, save_state
from monge.hf.stock import StockComparison, compare_with_stock, stock_inference
from monge.hf.upcycling import upcycle

if TYPE_CHECKING:
    from monge.hf.callback import RouterCallback

__all__ = [
    "RouterCallback",
    "RouterLog",
    "StockComparison",
    "compare_with_stock",
    "load_state",
    "register_experts",
    "restore_router",
    "save_state",
    "stock_inference",
    "upcycle",
    "use_experts",
    "use_router",
]


def __getattr__(name: str) -> Any:
    if name == "RouterCallback":  # a subclass of transformers' class, which costs seconds to import
        from monge.hf.callback import RouterCallback

        return RouterCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
