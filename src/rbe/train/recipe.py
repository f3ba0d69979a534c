"""Optimizer and phases as a configuration asks for them."""

from collections.abc import Callable

from torch import nn

from rbe.errors import RbeError
from rbe.nn import Stream
from rbe.optim import HybridAdam, Phase, Phases, StreamAdam, rounds, three_phases
from rbe.train.config import Config

PHASES: dict[str, Callable[[int], Phases]] = {
    "one": lambda total: Phases(total, (Phase(1.0),)),
    "three": three_phases,
    "rounds": rounds,
}


def build_optimizer(config: Config, model: nn.Module, steps: int) -> HybridAdam | StreamAdam:
    """The optimizer of a run of so many steps.

    Raises:
        RbeError: a stream has no bytes, or the optimizer refuses what it is given.
    """
    recipe = config.train
    if config.seeds.streamed:
        lr = recipe.lr if recipe.latent_lr is None else recipe.latent_lr
        parts: dict[tuple[str, int], list[Stream]] = {}
        for name, module in model.named_modules():
            if isinstance(module, Stream):
                parts.setdefault(config.seeds.budget(name), []).append(module)
                if not config.seeds.budget(name)[1]:
                    raise RbeError(f"train: {name} is a stream without bytes; give [seeds] bytes")
        budgets = [(layers, size) for (_, size), layers in parts.items()]
        return StreamAdam(model, budgets, steps, lr, dense_lr=lr / 10 if recipe.dense_lr is None else recipe.dense_lr)
    return HybridAdam(
        model,
        recipe.lr,
        method=recipe.method,  # type: ignore[arg-type]
        latent_lr=recipe.latent_lr,
        dense_lr=recipe.dense_lr,
        weight_decay=recipe.weight_decay,
        pull=recipe.pull,
        clip_norm=recipe.clip_norm,
        seed=recipe.seed,
    )
