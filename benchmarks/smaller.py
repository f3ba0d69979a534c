"""A peer for rows of `benchmarks.headline`: the same network, smaller, every weight of few bits, in equal bytes.

    RBE_DATA=... python -m benchmarks.smaller [--only cifar-mlp-64-stream ...] [--share 0.125]

The widest network whose matrices, at 4, 2 or 1 bits a weight (quantisation-aware training, straight through, with a
learned step a matrix), and everything else in float16 fit the whole bytes of the finished run in seeds. It has the same
data, the same teacher, the recipe of the dense run, and the epochs of the dense run (and of what that one starts from)
and of the run in seeds together.
Bits, learning rate and weight decay are chosen on validation, in runs of a share of these epochs. What is no matrix is
measured in float32, which favours the peer. Runs are kept in runs/smaller and go on where they were interrupted.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.headline import EXAMPLES, FORMS, ROWS, Row, run, say
from benchmarks.trained.values import first_step, on_grid
from rbe.train import Config, Result, load_config, train
from rbe.train.config import Model, Seeds
from rbe.train.networks import dense
from rbe.train.pictures import ResNet20
from rbe.train.planting import matrices
from rbe.train.run import TASKS

# In the order in which they are tried: the first of each is where tuning begins.
BITS = (2, 4, 1)
RATES = (3e-3, 1e-2, 1e-3)
# Tried where the highest of them was best.
HIGHER = 3e-2
# Of a given model, in epochs of the example: 2,740 steps.
GIVEN = {"gpt-dense": 27}
FOLDER = EXAMPLES.parent / "runs" / "smaller"
# MNIST and Fashion-MNIST have more peers in `benchmarks.trained`, LeNet-5 published ones; of the Transformer for
# translation the table of subwords outweighs all matrices.
NAMES = (
    "mnist-64-stream",
    "fashion-64-stream",
    "cifar-mlp-64-stream",
    "resnet20-64-stream",
    "resnet20x4-150-stream",
    "lstm-180-stream",
    "gpt-200-stream",
)


class Grid(nn.Module):
    """A matrix of few bits, as a parametrization of the float32 numbers that are trained."""

    def __init__(self, matrix: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(first_step(matrix.detach(), bits))

    def forward(self, latent: Tensor) -> Tensor:
        """The numbers as they are stored."""
        return on_grid(latent, self.step, self.bits)


class FewBitLSTM(nn.Module):
    """torch's LSTM, which keeps its own list of weights, with matrices of few bits."""

    def __init__(self, lstm: nn.LSTM, bits: int) -> None:
        super().__init__()
        # A list, so that its own parameters are not found twice.
        self.like = [lstm]
        self.latents = nn.ParameterList(lstm.parameters())  # in the order in which torch.lstm wants them
        self.grids = nn.ModuleList(Grid(p, bits) if p.ndim == 2 else nn.Identity() for p in self.latents)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As torch's, batch first."""
        lstm = self.like[0]
        weights = [grid(p) for grid, p in zip(self.grids, self.latents, strict=True)]
        start = (x.new_zeros(lstm.num_layers, len(x), lstm.hidden_size),) * 2 if state is None else state
        y, h, c = torch.lstm(x, start, weights, lstm.bias, lstm.num_layers, lstm.dropout, self.training, False, True)
        return y, (h, c)


def few_bits(network: nn.Module, bits: int) -> nn.Module:
    """Every matrix of a dense network on a grid; in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.LSTM):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, FewBitLSTM(module, bits))
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            parametrize.register_parametrization(module, "weight", Grid(module.weight, bits))
    return network


def sized(config: Config, size: int) -> tuple[Config, Callable[[Config], nn.Module]]:
    """The configuration with a network of this size (hidden units, channels or features), and what builds it."""
    model = config.model
    widths = list(model.widths)
    ratio = size / {"mlp": widths[1], "resnet20": 16}.get(model.kind, model.size)
    if model.kind == "resnet20":
        return config, lambda _: ResNet20(size)
    if model.kind == "mlp":
        hidden = [max(1, round(units * ratio)) for units in widths[1:-1]]
        smaller: Model = replace(model, widths=(widths[0], *hidden, widths[-1]))
    else:
        smaller = replace(model, size=size, inner=round(model.inner * ratio))
    return replace(config, model=smaller), dense


def stored(network: nn.Module, bits: int) -> int:
    """Bytes of a network with matrices of few bits: codes, a float16 step a matrix, and float16 for all the rest.

    Norms are folded into a factor and a term a unit, and the two biases of a recurrent layer into one.
    """
    found = list(matrices(network))
    own = {id(m.weight) for m in found}
    rest = sum(p.numel() for name, p in network.named_parameters() if id(p) not in own and "bias_hh" not in name)
    return sum(math.ceil(m.weight.numel() * bits / 8) + 2 for m in found) + 2 * rest


def widest(config: Config, bits: int, whole: int) -> tuple[int, int]:
    """(size, bytes) of the largest network that fits; heads divide its size."""
    each = config.model.heads if config.model.kind == "gpt" else 1
    best = 0, 0
    for size in range(each, 4096, each):
        with torch.device("meta"):
            smaller, make = sized(config, size)
            nbytes = stored(make(smaller), bits)
        if nbytes > whole:
            return best
        best = size, nbytes
    return best


def peer(row: Row, whole: int, settings: dict[str, Any], epochs: int) -> tuple[Result, int, int]:
    """(result, size, bytes) of a run with these settings, finished or to be trained now."""
    own, base = (load_config(EXAMPLES / f"{name}.toml") for name in (row.seeds, row.dense))
    bits, lr, decay = settings["bits"], settings["lr"], settings["decay"]
    base = replace(base, model=replace(base.model, start=None))
    size, nbytes = widest(base, bits, whole)
    label = f"{row.seeds} {size} units {bits} bits rate {lr:g} decay {decay:g} {epochs} epochs"
    taught = {"teacher": own.train.teacher, "softness": own.train.softness, "weight": own.train.weight}
    steps = {"steps": own.train.steps, "batch": own.train.batch, "dtype": own.train.dtype}
    recipe = replace(base.train, epochs=epochs, lr=lr, weight_decay=decay, **taught, **steps)
    config, make = sized(replace(base, name=label, data=own.data, seeds=Seeds(format="dense"), train=recipe), size)
    result = train(config, FOLDER / label, say(label), build=lambda c: few_bits(make(c), bits))
    return result, size, nbytes


def tuned(row: Row, whole: int, epochs: int) -> dict[str, Any]:
    """Settings that are best on validation: bits first, then the rate, then whether weights decay as the dense ones."""
    config = load_config(EXAMPLES / f"{row.dense}.toml")
    decay, rises = config.train.weight_decay, TASKS[config.data.task].rises
    best: dict[str, Any] = {"bits": BITS[0], "lr": RATES[0], "decay": 0.0}

    def reached(settings: dict[str, Any]) -> float:
        value = peer(row, whole, settings, epochs)[0].validation
        return value if rises else -value

    known = reached(best)
    for key, values in (("bits", BITS), ("lr", RATES), ("decay", (0.0, decay) if decay else (0.0,))):
        for value in values[1:]:
            other = {**best, key: value}
            if (now := reached(other)) > known:
                best, known = other, now
        if key == "lr" and best["lr"] == max(RATES) and (now := reached({**best, "lr": HIGHER})) > known:
            best, known = {**best, "lr": HIGHER}, now
    return best


def spent(dense_run: str) -> float:
    """Epochs of a dense run and of the one it starts from; images shrunk by n count 1 / n^2, as they are less work."""
    config = load_config(EXAMPLES / f"{dense_run}.toml")
    epochs = config.train.epochs / config.data.shrink**2
    if dense_run in GIVEN:
        return GIVEN[dense_run]
    return epochs + (spent(Path(config.model.start).name) if config.model.start else 0.0)


def line(row: Row, share: float, epochs_own: int | None, rate: float | None = None) -> str:
    own = run(row.seeds, 0, epochs_own)
    epochs = math.ceil(spent(row.dense)) + len(own.curve)
    settings = tuned(row, own.bytes, max(1, round(share * epochs)))
    # A short run may favour a rate that a long one does not bear: then both are trained, and validation decides.
    rates = {settings["lr"], min(settings["lr"], max(RATES))} if rate is None else {rate}
    whole = [({**settings, "lr": rate}, *peer(row, own.bytes, {**settings, "lr": rate}, epochs)) for rate in rates]
    pick = max if TASKS[load_config(EXAMPLES / f"{row.dense}.toml").data.task].rises else min
    settings, result, size, nbytes = pick(whole, key=lambda one: one[1].validation)
    factor, decimals = FORMS[own.metric]
    values = (f"{factor * value:.{decimals}f}" for value in (result.validation, result.value, own.value))
    about = (
        f"{size} units, {settings['bits']} bits, rate {settings['lr']:g}, decay {settings['decay']:g}, {epochs} epochs"
    )
    return f"| {row.task} | {about} | {nbytes:,} | {own.bytes:,} | {' | '.join(values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smaller", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="rows; all by default")
    parser.add_argument("--share", type=float, default=0.125, help="of the epochs, for runs that only tune")
    parser.add_argument("--epochs", type=int, help="of the run in seeds, if it was a shorter one")
    parser.add_argument("--rate", type=float, help="of the whole run, in place of those that are best in short ones")
    args = parser.parse_args()
    print("| task | smaller, few bits | its bytes | bytes of seeds | its validation | its test | test of seeds |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        if row.seeds in args.only:
            print(line(row, args.share, args.epochs, args.rate), flush=True)


if __name__ == "__main__":
    main()
