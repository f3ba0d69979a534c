"""What torch is recording: transforms of torch.func, and the dense tensors that autograd would keep."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks


def transformed() -> bool:
    """Whether torch.func or forward derivatives are at work, outside of torch.compile."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def made_again(dense: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """While this is open, autograd does not keep `dense` for its backward pass but calls `make` for it then.

    Under torch.func and torch.compile, which allow no such hooks, the tensor is kept. Where somebody else has hooks, as
    activation checkpointing has, theirs go on: ours would hide them from all that is saved in here.
    """
    if torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled():
        return nullcontext()
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return nullcontext()
    address, shape = dense.data_ptr(), dense.shape

    def keep(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address and saved.shape == shape else saved

    def give(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return make()

    return saved_tensors_hooks(keep, give)
