"""A second device that is none: tensors of the CPU that count as those of an accelerator.

Where there is no accelerator, this shows whether code would run on one: an operation of tensors of both
devices fails as it would there, and so does numpy on a tensor of the device. What is pretended of a tensor is
remembered by its storage, so views belong to the device of what they view.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("xpu")
"""Not of the CPU, and without paths of its own in the code under test."""
OFF_DEVICE = ("numpy", "__array__", "__dlpack__")
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
OPAQUE = (torch.nn.functional.one_hot,)
"""Make tensors of their own, of which nobody can tell where they are meant to lie."""
INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class Marks:
    """The storages that lie on the device."""

    def __init__(self) -> None:
        self.refs: dict[int, StorageWeakRef] = {}  # a reference keeps the address from being used again

    def add(self, found: object) -> None:
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.refs[storage._cdata] = StorageWeakRef(storage)

    def __contains__(self, tensor: Tensor) -> bool:
        ref = None if tensor.is_meta else self.refs.get(tensor.untyped_storage()._cdata)
        return ref is not None and not ref.expired()


class Operations(TorchDispatchMode):
    """Results of what lies on the device lie there too; what lies on both devices does not meet."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks, self.checks = marks, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t in self.marks for t in given]
        name = func._schema.name
        if self.checks and any(here) and name not in CROSSING:
            checked = zip(given, here, strict=True)
            strange = [t for t, on in checked if not on and t.dim() and not t.is_meta]
            written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
            if written[0] and not here[0]:
                strange = given[:1]
            if name in INDEXING and given[0] in self.marks:
                strange = []  # which torch takes from the CPU as well
            if strange:
                raise RuntimeError(f"{name}: tensors on {DEVICE} and on cpu {tuple(strange[0].shape)}")
        result = func(*args, **(kwargs or {}))
        moved = name == "aten::_to_copy"
        if (given[0] in self.marks) if moved and given else any(here):
            self.marks.add(result)
        return result


class Places(TorchFunctionMode):
    """What is asked for on the device is made on the CPU and remembered; ``device`` tells of it."""

    def __init__(self, marks: Marks, operations: Operations) -> None:
        super().__init__()
        self.marks, self.operations = marks, operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is Tensor.device:
            return DEVICE if args[0] in self.marks else func(*args)
        if func in OPAQUE and args[0] in self.marks:
            self.operations.checks = False
            try:
                result = func(*args, **kwargs)
            finally:
                self.operations.checks = True
            self.marks.add(result)
            return result
        if func is Tensor.backward:  # whose hooks are Python, and count as well
            keep = bool(kwargs.get("retain_graph"))
            gradient = torch.ones_like(args[0]) if kwargs.get("gradient") is None else kwargs["gradient"]
            with self:
                return _engine_run_backward(
                    args, (gradient,), keep, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if name in OFF_DEVICE and args[0] in self.marks:
            raise TypeError(f"{name} of a tensor on {DEVICE}: copy it to the CPU first")
        if func is Tensor.cpu:
            return self._moved(func, args, kwargs, torch.device("cpu"))
        if func in (Tensor.to, torch.nn.Module.to):
            wanted = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, str | torch.device | Tensor)]
            if wanted:
                place = wanted[0]
                place = self._place(place) if isinstance(place, Tensor) else torch.device(place)
                if place.type in (DEVICE.type, "cpu"):
                    return self._moved(func, args, kwargs, place)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == DEVICE.type:
            result = func(*args, **kwargs | {"device": "cpu"})
            self.marks.add(result)
            return result
        return func(*args, **kwargs)

    def _place(self, tensor: Tensor) -> torch.device:
        return DEVICE if tensor in self.marks else torch.device("cpu")

    def _moved(self, func, args, kwargs, place: torch.device) -> Tensor:
        args, kwargs = tree_map_only((torch.device, str), lambda _: "cpu", (args, kwargs))
        result = func(*args, **kwargs)
        if self._place(args[0]).type == place.type:
            if place.type == DEVICE.type:
                self.marks.add(result)
            return result
        storage = result.untyped_storage()._cdata
        if storage == args[0].untyped_storage()._cdata:
            result = result.clone()
        if place.type == DEVICE.type:
            self.marks.add(result)
        else:
            self.marks.refs.pop(result.untyped_storage()._cdata, None)
        return result


@contextmanager
def pretended_device():
    """Within it ``torch.device("xpu")`` may be named."""
    marks = Marks()
    with ExitStack() as stack:
        stack.enter_context(patch("torch.xpu.get_device_name", lambda device: "pretended"))
        operations = stack.enter_context(Operations(marks))
        stack.enter_context(Places(marks, operations))
        yield DEVICE
