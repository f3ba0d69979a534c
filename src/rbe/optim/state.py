"""States of optimizers: whether what is loaded was saved for the same parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rbe.errors import RbeError

# Shapes that a tensor of the state may have: (role of the group, name in the state, parameter).
Shapes = Callable[[str, str, Tensor], tuple[torch.Size, ...]]


def check(optimizer: torch.optim.Optimizer, saved: dict[str, Any], shapes: Shapes, group_keys: tuple[str, ...]) -> None:
    """Refuse the state of another optimizer or model, before anything is changed.

    torch compares the number of parameters alone, and steps that walk through memory would then walk out of it.

    Args:
        group_keys: what every group of this optimizer has beside torch's own.

    Raises:
        RbeError: the state is not of this kind, or its groups, parameters or shapes are others.
    """
    name = type(optimizer).__name__
    try:
        groups, states = saved["param_groups"], saved["state"]
        given = [(group.get("role"), len(group["params"])) for group in groups]
        missing = [key for group in groups for key in group_keys if key not in group]
        tensors = [
            (group["role"], key, p, value)
            for group, mine in zip(groups, optimizer.param_groups, strict=False)
            for index, p in zip(group["params"], mine["params"], strict=False)
            for key, value in states.get(index, {}).items()
            if isinstance(value, Tensor) and key != "step" and not missing
        ]
    except (KeyError, TypeError, AttributeError) as cause:
        raise RbeError(
            f"{name}: this is no state of an optimizer ({cause!r}); give what state_dict() returned"
        ) from cause
    own = [(group["role"], len(group["params"])) for group in optimizer.param_groups]
    if missing or given != own:
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
