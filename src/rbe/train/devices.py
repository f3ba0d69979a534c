"""Where a network is trained: the device that was named, and what of it goes into a checkpoint."""

from typing import Any

import torch
from torch import Tensor

from rbe.errors import RbeError

# Of a checkpoint: the state of the random numbers that are drawn on a device other than the CPU.
DRAWS = "device_draws"


def named_device(name: str | torch.device) -> torch.device:
    """A device that computes.

    >>> named_device("cpu")
    device(type='cpu')

    Raises:
        RbeError: there is none of this name here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # definitions compute in float64
    # Names that torch does not know, or was built without, or whose hardware is missing or has no float64.
    except (RuntimeError, AssertionError, ImportError, TypeError) as cause:
        told = str(cause).strip().partition("\n")[0]
        raise RbeError(
            f"train: there is no device {name} here ({told}); give cpu, or cuda where torch finds a GPU"
        ) from cause
    return device


def at_hand(some: Any) -> Any:
    """A state with all its tensors on the CPU, so that a run can go on wherever it is read.

    >>> at_hand({"rate": 0.1, "mean": [torch.zeros(2)]})
    {'rate': 0.1, 'mean': [tensor([0., 0.])]}
    """
    if isinstance(some, Tensor):
        return some.cpu()
    if isinstance(some, dict):
        made: Any = type(some)((key, at_hand(value)) for key, value in some.items())
        if hasattr(some, "_metadata"):  # what layers say of themselves in the state of a model
            made._metadata = some._metadata
        return made
    if isinstance(some, list | tuple):
        return type(some)(at_hand(value) for value in some)
    return some


def device_draws(device: torch.device) -> dict[str, Tensor]:
    """The state of the random numbers that dropout draws there; nothing of the CPU, whose state is torch's own."""
    module: Any = getattr(torch, device.type, None)
    return {DRAWS: module.get_rng_state(device)} if hasattr(module, "get_rng_state") else {}


def draw_on(device: torch.device, saved: dict[str, Any]) -> None:
    """Go on drawing where a checkpoint stood, if that was of a device of this kind."""
    module: Any = getattr(torch, device.type, None)
    if DRAWS in saved and hasattr(module, "set_rng_state"):
        module.set_rng_state(saved[DRAWS], device)
