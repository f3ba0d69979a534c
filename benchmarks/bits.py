"""Discrete bits of packed128, trained three ways: not at all, by state transitions, by beam search; MNIST at 64:1.

    RBE_DATA=... python -m benchmarks.bits [--epochs 6] [--every 20] [--share 0.05] [--seeds 0]

The points of every seed are trained alike. Bits change until three quarters of the run, on the batch just used. Prints
validation and test accuracy of the epoch that is best on validation, the share of proposals accepted, and the time.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.loop import CONFIG, Loss, fit
from rbe.optim import Cooling, HybridAdam, PowerDecay, three_phases
from rbe.optim.transitions import Outcome
from rbe.train import data, load_config, networks
from rbe.train.run import accuracy

Change = Callable[[HybridAdam, Loss, float, float], Outcome]
WAYS: dict[str, Change | None] = {
    "points only": None,
    "flip": lambda o, loss, share, t: o.flip(loss, share=share, temperature=t),
    "beam": lambda o, loss, share, t: o.beam(loss, share=share),
}


def run(way: str, epochs: int, every: int, share: float, seed: int) -> None:
    config = load_config(CONFIG)
    config = replace(
        config,
        seeds=replace(config.seeds, format="packed128"),
        train=replace(config.train, epochs=epochs, seed=seed),
    )
    images, recipe = data.load(config), config.train
    torch.manual_seed(seed)
    model = networks.build(config)
    optimizer = HybridAdam(model, recipe.lr, seed=seed)
    total = epochs * (len(images.train[0]) // recipe.batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [recipe.lr] * len(optimizer.param_groups), total_steps=total, cycle_momentum=False
    )
    plan, settle, temperature = three_phases(total, warmup=0.02), PowerDecay(total / 4, 2.0), Cooling()
    proposed = accepted = 0

    def after(epoch: int, t: int, loss: Loss) -> None:
        nonlocal proposed, accepted
        change = WAYS[way]
        if change is not None and t % every == 0 and plan(t).bits:
            outcome = change(optimizer, loss, max(share * settle(t), 1e-6), temperature(epoch))
            proposed, accepted = proposed + outcome.proposed, accepted + outcome.accepted

    best, seconds = fit(config, images, model, optimizer, scheduler, after=after)
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
