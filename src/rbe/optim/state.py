"""States of optimizers: whether what is loaded fits, and Adam's step for whatever lies in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from rbe.errors import RbeError
from rbe.nn.stream import streams

# Shapes that a tensor of the state may have: (role of the group, name in the state, parameter).
Shapes = Callable[[str, str, Tensor], tuple[torch.Size, ...]]


def check(optimizer: torch.optim.Optimizer, saved: dict[str, Any], shapes: Shapes) -> None:
    """Refuse the state of another optimizer or model, before anything is changed.

    torch compares the number of parameters alone, and steps that walk through memory would then walk out of it.

    Raises:
        RbeError: the state is not of this kind, or its groups, parameters or shapes are others.
    """
    name = type(optimizer).__name__
    try:
        groups, states = saved["param_groups"], saved["state"]
        given = [(group.get("role"), len(group["params"])) for group in groups]
        tensors = [
            (group.get("role"), key, p, value)
            for group, mine in zip(groups, optimizer.param_groups, strict=False)
            for index, p in zip(group["params"], mine["params"], strict=False)
            for key, value in states.get(index, {}).items()
            if isinstance(value, Tensor) and key != "step"
        ]
    except (KeyError, TypeError, AttributeError) as cause:
        raise RbeError(f"{name}: this is no state of it ({cause!r}); give what its state_dict() returned") from cause
    own = [(group.get("role"), len(group["params"])) for group in optimizer.param_groups]
    if given != own:
        raise RbeError(
            f"{name}: the state is of another model or optimizer: its groups (role, parameters) are {given}, here they "
            f"are {own}; build the same model and give what state_dict() returned"
        )
    for role, key, p, value in tensors:
        if value.shape not in shapes(role, key, p):
            raise RbeError(
                f"{name}: the state is of another model or method: {key} of a parameter {tuple(p.shape)} is "
                f"{tuple(value.shape)}; build the same model and optimizer"
            )


def refuse_streams(model: nn.Module) -> None:
    """Refuse a model of streams, whose bytes nobody would watch.

    Raises:
        RbeError: it has open ones.
    """
    if any(layer.trainable for layer in streams(model)):
        raise RbeError("HybridAdam: the model has open streams; train it with rbe.optim.StreamAdam")


def lay(states: dict[Tensor, dict[str, Any]]) -> None:
    """Let moments lie in memory as their parameters do, where the fused step takes the same bits as before."""
    for p, state in states.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def adam_all(moving: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """One step of torch's own Adam for some tensors, in place.

    Args:
        states: `mean`, `square` and `step` of each.
        group: betas, lr, weight_decay (decoupled) and eps.
    """
    first, second = group["betas"]
    # The fused step walks through memory: what lies in it otherwise than its parameter takes the plain one.
    alike = [_alike(p, grad, state) for p, grad, state in zip(moving, grads, states, strict=True)]
    for fused in (True, False):
        chosen = [k for k, same in enumerate(alike) if same == fused]
        if chosen:
            adam(
                [moving[k] for k in chosen],
                [grads[k] for k in chosen],
                [states[k]["mean"] for k in chosen],
                [states[k]["square"] for k in chosen],
                [],
                [states[k]["step"] for k in chosen],
                foreach=False,
                fused=fused,
                decoupled_weight_decay=True,
                amsgrad=False,
                beta1=first,
                beta2=second,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _alike(p: Tensor, grad: Tensor, state: dict[str, Any]) -> bool:
    """Whether a parameter, its gradient and its moments, which have no gaps, lie in memory alike."""
    return all(t.stride() == p.stride() for t in (grad, state["mean"], state["square"]))
