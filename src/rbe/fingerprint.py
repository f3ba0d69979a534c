"""What a model of transformers answers to a fixed input, and how far two answers are apart."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.mixing import fmix32


def answer(model: Any) -> dict[str, Any]:
    """What a transformers model answers to a fixed input, ready for JSON; see `rbe.hf.fingerprint`.

    Raises:
        RbeError: the model does not take token ids.
    """
    config = model.config.get_text_config(decoder=True)
    vocabulary = getattr(config, "vocab_size", None)
    if not vocabulary:
        raise RbeError(f"fingerprint: {type(model).__name__} does not take token ids")
    longest = int(getattr(config, "max_position_embeddings", 0) or 16)
    length = max(1, min(12, longest - 4))
    ids = (fmix32(torch.arange(1, 2 * length + 1)) % int(vocabulary)).reshape(2, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    try:
        with torch.inference_mode():
            output = model(**inputs, return_dict=True)
    except (AttributeError, TypeError, ValueError) as cause:
        takes = inspect.signature(model.forward).parameters
        wanted = [name for name in ("pixel_values", "input_features", "input_values") if name in takes]
        if not wanted:
            raise
        raise RbeError(
            f"fingerprint: {type(model).__name__} wants {', '.join(wanted)}, and is given token ids alone"
        ) from cause
    name, values = next((key, value) for key, value in output.items() if isinstance(value, Tensor))
    flat = values.detach().float().reshape(-1)
    picked = flat[fmix32(torch.arange(32)) % flat.numel()]
    return {
        "class": type(model).__name__,
        "output": name,
        "shape": list(values.shape),
        "values": [float(f"{value:.6g}") for value in picked.tolist()],
        "norm": float(f"{float(flat.norm()):.6g}"),
    }


def difference(now: dict[str, Any], expected: dict[str, Any]) -> float | str:
    """Largest difference of two answers, in parts of the root mean square output; or, in words, why there is none."""
    for key in ("class", "output", "shape"):
        if now[key] != expected.get(key):
            return f"{key} is {now[key]}, it was {expected.get(key)}"
    unit = max(float(expected["norm"]) / math.prod(now["shape"]) ** 0.5, 1e-12)
    worst: float = max(abs(a - b) for a, b in zip(now["values"], expected["values"], strict=True)) / unit
    of_norm: float = abs(now["norm"] - float(expected["norm"])) / max(float(expected["norm"]), 1e-12)
    return max(worst, of_norm)
