"""Which weights fine-tuning changes, and the model as it is while they are changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from monge.conversion.config import ConvertConfig
from monge.conversion.low_rank import low_rank_updates
from monge.conversion.straight_through import straight_through
from monge.conversion.teacher import head_module


@contextmanager
def trainable_weights(model: nn.Module, config: ConvertConfig) -> Iterator[list[nn.Parameter]]:
    """Prepare ``model`` for training and yield the parameters to train; only they require a gradient.

    ``config.trainable`` "all": everything but embeddings and the head. "low_rank": updates of the linear
    weights and the experts (`low_rank_updates`), and the routers. Routers are `StraightThrough` in here. The
    model is in evaluation mode: no dropout. When the context is left, after an exception too, the model has
    its own routers and merged weights, no gradients, and the flags that it had before.

    Raises:
        ValueError: a weight to be trained is not float32 or float64.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    with ExitStack() as stack:
        try:
            model.eval()
            model.requires_grad_(False)
            routers = stack.enter_context(straight_through(model, config.gates))
            if config.trainable == "low_rank":
                updates = stack.enter_context(low_rank_updates(model, config.rank, config.seed))
                parameters = updates + [weight for router in routers for weight in router.parameters()]
            else:
                frozen = {id(weight) for weight in _embeddings_and_head(model)}
                parameters = [weight for weight in model.parameters() if id(weight) not in frozen]
            for parameter in parameters:
                if parameter.dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"weights of {type(model).__name__} are {parameter.dtype}, too coarse for small "
                        "updates: load the model with dtype=float32"
                    )
                parameter.requires_grad_(True)
            yield parameters
        finally:
            stack.close()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None
            model.train(training)


def _embeddings_and_head(model: nn.Module) -> list[nn.Parameter]:
    head = head_module(model)
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    return [weight for module in modules for weight in module.parameters()]
