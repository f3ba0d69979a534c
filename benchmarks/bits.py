"""Discrete bits of packed128, trained three ways: not at all, by state transitions, by beam search; MNIST at 64:1.

    RBE_DATA=... python -m benchmarks.bits [--epochs 6] [--every 20] [--share 0.05] [--seeds 0]

The points of every seed are trained alike. Bits change until three quarters of the run, on the batch just used. Prints
validation and test accuracy of the epoch that is best on validation, the share of proposals accepted, and the time.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rbe.optim import Cooling, HybridAdam, PowerDecay, three_phases
from rbe.optim.transitions import Outcome
from rbe.train import data, load_config, networks
from rbe.train.run import accuracy

CONFIG = Path(__file__).parent.parent / "examples" / "mnist-64.toml"
Change = Callable[[HybridAdam, Callable[[], Tensor], float, float], Outcome]
WAYS: dict[str, Change | None] = {
    "points only": None,
    "flip": lambda o, loss, share, t: o.flip(loss, share=share, temperature=t),
    "beam": lambda o, loss, share, t: o.beam(loss, share=share),
}


def run(way: str, epochs: int, every: int, share: float, seed: int) -> None:
    config = load_config(CONFIG)
    config = replace(config, seeds=replace(config.seeds, format="packed128"))
    images, recipe = data.load(config), config.train
    torch.manual_seed(seed)
    model = networks.build(config)
    optimizer = HybridAdam(model, recipe.lr, seed=seed)
    x, y = images.train
    steps = len(x) // recipe.batch
    total = epochs * steps
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [recipe.lr] * len(optimizer.param_groups), total_steps=total, cycle_momentum=False
    )
    plan, settle, temperature = three_phases(total, warmup=0.02), PowerDecay(total / 4, 2.0), Cooling()
    generator = torch.Generator().manual_seed(seed)
    best, kept, proposed, accepted, began = -1.0, {}, 0, 0, time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        model.train()
        for k in range(steps):
            chosen = order[k * recipe.batch : (k + 1) * recipe.batch]

            def loss(chosen: Tensor = chosen) -> Tensor:
                return functional.cross_entropy(model(x[chosen]), y[chosen])

            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            scheduler.step()
            t, change = epoch * steps + k, WAYS[way]
            if change is not None and t % every == 0 and plan(t).bits:
                outcome = change(optimizer, loss, max(share * settle(t), 1e-6), temperature(epoch))
                proposed, accepted = proposed + outcome.proposed, accepted + outcome.accepted
        found = accuracy(model, *images.validation)
        if found > best:
            best, kept = found, {name: value.clone() for name, value in model.state_dict().items()}
    seconds = time.monotonic() - began
    model.load_state_dict(kept)
    test = accuracy(model, *images.test)
    changes = f"{accepted} of {proposed}" if proposed else "-"
    print(f"| {way} | {seed} | {100 * best:.2f} | {100 * test:.2f} | {changes} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.05, help="of the seeds that may change, at first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    print(f"\n{args.epochs} epochs, bits every {args.every} steps, of {args.share:g} of the seeds at first\n")
    print("| bits | seed | validation | test | changes accepted | s |\n|---|---|---|---|---|---|")
    for seed in args.seeds:
        for way in args.ways:
            run(way, args.epochs, args.every, args.share, seed)


if __name__ == "__main__":
    main()
