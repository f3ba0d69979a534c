"""A device that is not there: tensors that say they are on another device, compute on the CPU, and refuse those of it.

`meta` is the one device that torch lets be named without anything behind it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
# What moves numbers from one device to another, and, as for a GPU, what takes indices from the CPU.
CROSSING, INDEXED = ("copy_", "_to_copy", "to"), ("index", "index_put_")


class _There(Tensor):
    """A tensor of the other device; `held` has its numbers."""

    held: Tensor
    # Modules write nothing into what has nothing behind it.
    is_meta = False

    @staticmethod
    def __new__(cls, held: Tensor) -> "_There":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=NAME
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """From lists and to lists torch asks no dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], _There):
            return args[0].held.tolist()
        if func is not torch.tensor or torch.device(options.get("device") or "cpu").type != NAME:
            return func(*args, **options)
        return func(*args, **{**options, "device": "cpu"}).to(NAME)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Within it the device computes."""
    with _Operations(), _Lists():
        yield


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    tensors, named = ([one for one in leaves if isinstance(one, kind)] for kind in (Tensor, torch.device))
    there = {id(t.held): t for t in tensors if isinstance(t, _There)}
    if func.namespace == "rbe" and there:
        # Dispatched by nobody: its code sees where its tensors are.
        with elsewhere():
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    # A GPU takes single numbers from the CPU.
    here = [t for t in tensors if not isinstance(t, _There) and t.ndim]
    name = func.overloadpacket.__name__
    fine = name in CROSSING or (name in INDEXED and isinstance(args[0], _There))
    if there and here and not fine:
        raise RuntimeError(f"{func}: tensors on two devices")
    args, kwargs = tree_map(_on_the_cpu, (args, kwargs))
    out = func(*args, **kwargs)
    if not (named[0].type == NAME if named else there):
        return out

    def sent(some: Any) -> Any:
        # What an operation writes into is returned as itself.
        return there[id(some)] if id(some) in there else _There(some) if isinstance(some, Tensor) else some

    return tree_map(sent, out)


def _on_the_cpu(some: Any) -> Any:
    if isinstance(some, torch.device):
        return torch.device("cpu")
    return some.held if isinstance(some, _There) else some
