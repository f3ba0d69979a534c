"""Phases and rounds against a plain run of the same length: MNIST at 64:1, with the rest in 32, 16 and 8 bits.

    RBE_DATA=... python -m benchmarks.rounds [--epochs 20] [--seeds 0 1] [--plans plain rounds]

Per plan and seed: validation and test accuracy of the epoch that is best on validation, then bytes and accuracies of
the same network with its norms folded and the rest rounded (`rbe.nn.round_rest`).
"""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.loop import CONFIG, fit
from rbe.nn import round_rest, stored_bytes
from rbe.optim import HybridAdam, Phase, Phases, rounds, three_phases
from rbe.train import data, load_config, networks
from rbe.train.run import accuracy

PLANS = {
    "plain": lambda total: Phases(total, (Phase(1.0),)),
    "three phases": three_phases,
    "rounds": rounds,
    "late rounds": lambda total: rounds(total, start=0.8),
}


def cycle(total: int) -> Callable[[int], float]:
    """A third of the run up, then down to 0 along a cosine: factors of the learning rate."""

    def factor(t: int) -> float:
        share = t / total
        return (0.04 + 0.96 * share / 0.3) if share < 0.3 else 0.5 + 0.5 * math.cos(math.pi * (share - 0.3) / 0.7)

    return factor


def run(name: str, epochs: int, seed: int) -> None:
    config = load_config(CONFIG)
    config = replace(config, train=replace(config.train, epochs=epochs, seed=seed))
    images, recipe = data.load(config), config.train
    torch.manual_seed(seed)
    model = networks.build(config)
    optimizer = HybridAdam(model, recipe.lr, seed=seed)
    total = epochs * (len(images.train[0]) // recipe.batch)
    plan = PLANS[name](total)
    scheduler = LambdaLR(optimizer, plan.factors(optimizer, cycle(total)))
    held = 0.0

    def before(t: int) -> None:
        nonlocal held
        if plan(t).held != held:
            held = plan(t).held
            optimizer.hold(held)

    best, seconds = fit(config, images, model, optimizer, scheduler, before)
    optimizer.freeze()
    whole = networks.sizes(model)["bytes"]
    cells = [str(whole), f"{100 * best:.2f}", f"{100 * accuracy(model.eval(), *images.test):.2f}"]
    for bits in (16, 8):
        small: nn.Module = copy.deepcopy(model)
        stored = round_rest(small, bits)
        cells += [f"{stored_bytes(stored)}", f"{100 * accuracy(small, *images.validation):.2f}"]
        cells += [f"{100 * accuracy(small, *images.test):.2f}"]
    print(f"| {name} | {seed} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    args = parser.parse_args()
    parts = " | ".join(f"bytes, {bits} bits | validation | test" for bits in (16, 8))
    print(f"\n{args.epochs} epochs\n\n| plan | seed | bytes | validation | test | {parts} | s |\n|{'---|' * 12}")
    for seed in args.seeds:
        for name in args.plans:
            run(name, args.epochs, seed)


if __name__ == "__main__":
    main()
