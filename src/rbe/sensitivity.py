"""How much a model's answer hangs on each of its weight matrices, to first order, from gradients alone.

An encoder makes errors that look like noise: spread evenly over a matrix (its weights are rotated first), or over each
row of an embedding in proportion to the row. Such noise changes the answer by a squared length whose mean is the energy
of the noise times the squared norm of a gradient, so one backward pass tells it for all matrices at once.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rbe.calibrate import answer_of, call, running, still
from rbe.errors import RbeError

# Random sequences to read: options of `rbe.calibrate.random_tokens`. Twice as many tokens moved no rate of a sentence
# encoder by more than half a bit. Every batch is one draw of a direction, and few draws are noisy. Ranks alone decide
# how often a token is drawn, because the rows of the table of tokens are compared with one another.
INPUTS: dict[str, Any] = {"tokens": 6144, "together": 256, "uniform": 0.0}
# Rows of answers that are compared with each other.
_TOGETHER = 8


def sensitivities(model: nn.Module, weights: Mapping[str, bool], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean squared change of the answer that a relative squared error of 1 of each weight matrix would make.

    The answer is what `rbe eval` compares: the predicted distribution of a language model (the change is then twice the
    KL divergence), the unit-length mean of an encoder's hidden states, or whatever tensor the model returns, relative
    to its energy. Of the last two it is what tells one answer from another that counts, not what all have in common.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    >>> found = sensitivities(model, {"0.weight": False, "1.weight": False}, [torch.randn(50, 8)])
    >>> found["1.weight"].shape, bool(found["1.weight"] > 0)
    (torch.Size([]), True)

    Args:
        model: runs forward and backward on one batch at a time; it is not changed.
        weights: names of parameters, and whether their errors are in proportion to each row's size (embeddings).
        batches: what the model is called with: a mapping of arguments, a tuple of them, or one tensor.

    Returns:
        by name, per sequence or row of the answer: float64, 0-d, or (rows,) where errors are in proportion to each row;
        0 for a matrix that the answer does not hang on.

    Raises:
        RbeError: the model cannot be run on a batch, an answer or gradient is not finite, or the answers hang on none
            of the matrices.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    chosen = {name: known[name] for name in weights}
    sums = {
        name: torch.zeros(len(chosen[name]) if by_row else (), dtype=torch.float64) for name, by_row in weights.items()
    }
    rows = 0
    generator = torch.Generator().manual_seed(0)

    def differentiate(answers: list[Tensor]) -> None:
        answer = torch.cat(answers)
        if answer.shape[1] > 1:
            # What moves all answers alike changes no comparison between them.
            answer = answer - answer.mean(0)
        direction = (answer * _signs(answer.shape, generator).to(answer.device)).sum()
        if not direction.requires_grad:
            return
        grads = torch.autograd.grad(direction, list(chosen.values()), allow_unused=True)
        for (name, by_row), grad in zip(weights.items(), grads, strict=True):
            if grad is not None:
                sums[name] += _change(grad, chosen[name].detach(), by_row).cpu()

    with still(model), running(model, "allocate"):
        for p in chosen.values():
            p.requires_grad_(True)
        waiting: list[Tensor] = []
        for batch in batches:
            waiting.append(_answer(call(model, batch), batch, generator))
            rows += len(waiting[-1])
            if sum(map(len, waiting)) >= _TOGETHER:
                differentiate(waiting)
                waiting = []
        if waiting:
            differentiate(waiting)
    if not all(bool(total.isfinite().all()) for total in sums.values()):
        raise RbeError("allocate: the model's answers or gradients are NaN or infinite; the model is damaged")
    if rows == 0:
        raise RbeError("allocate: there are no inputs; give some, or 'random'")
    if weights and not any(bool(total.any()) for total in sums.values()):
        raise RbeError(
            f"allocate: the answers of {type(model).__name__} tell no matrices apart: they hang on none of them, or "
            "there is only one input to compare; give more inputs, look at include and exclude, or leave allocate out"
        )
    return {name: total / rows for name, total in sums.items()}


def _change(grad: Tensor, weight: Tensor, by_row: bool) -> Tensor:
    """Mean squared change of the objective by noise with the energy of the weight, or of each of its rows."""
    # Rows of a convolution's or a transposed weight differ from those of its matrix: noise that is even does not care.
    slope, energy = grad.flatten(1).double().square().sum(1), weight.flatten(1).double().square().sum(1)
    if by_row:
        return slope * energy * (len(weight) / weight.numel())
    return slope.sum() * energy.sum() / weight.numel()


def _answer(output: Any, batch: Any, generator: torch.Generator) -> Tensor:
    """The answer as rows (n, width), scaled so that squared changes mean the same everywhere."""
    answer = answer_of(output)
    if hasattr(output, "logits") and answer.ndim == 3:
        # The label is drawn from the model's own prediction: the squared gradient is then the Fisher information.
        logits = answer.reshape(-1, answer.shape[-1]).float()
        label = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
        return logits.log_softmax(-1).gather(1, label.to(logits.device))
    if hasattr(output, "last_hidden_state") and answer.ndim == 3:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask = answer.new_ones(answer.shape[:2]) if mask is None else mask
        parts = mask[..., None].to(answer.dtype)
        return normalize((answer * parts).sum(1) / parts.sum(1).clamp_min(1), dim=-1)
    flat = answer.reshape(len(answer), -1) if answer.ndim > 1 else answer.reshape(1, -1)
    return flat / flat.detach().square().sum(1).mean().sqrt().clamp_min(1e-30)


def _signs(shape: Any, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, tuple(shape), generator=generator) - 1.0
