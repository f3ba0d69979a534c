"""Bytes among matrices: against every possible division, and as a run uses them."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from rbe.errors import RbeError
from rbe.train import budget
from rbe.train.budget import EDGES, Choice, allocate
from rbe.train.config import Config, Data, Layer, Model, Recipe, Seeds
from rbe.train.images import Pictures
from rbe.train.planting import matrices, plant

# What each edge costs and loses, as matrices of three sizes and sensitivities have it: bytes times four, error falling.
LOSSES = {64: 0.985, 32: 0.94, 16: 0.78, 8: 0.42}
MATRICES = {"first": (50, 1.0), "second": (8, 3.0), "last": (1, 60.0)}


def options() -> dict[str, list[Choice]]:
    return {
        name: [Choice(edge, 16 * size * (64 // edge) ** 2, weight * LOSSES[edge] * size) for edge in EDGES]
        for name, (size, weight) in MATRICES.items()
    }


def test_the_division_is_the_best_there_is() -> None:
    ways = options()
    every = list(itertools.product(*ways.values()))
    worst = 0.0
    for limit in range(1000, 60_000, 500):
        best = min((sum(c.loss for c in way) for way in every if sum(c.bytes for c in way) <= limit), default=None)
        assert best is not None
        chosen = allocate(ways, limit)
        assert sum(c.bytes for c in chosen.values()) <= limit
        worst = max(worst, sum(c.loss for c in chosen.values()) / best)
    # Greedy steps are exact where a budget falls on one of them, and never far off between.
    assert worst < 1.15
    spent, loss = 0, 0.0
    for limit in (944 + 48, 944 + 48 + 192 + 3 * 128):
        chosen = allocate(ways, limit)
        spent, loss = sum(c.bytes for c in chosen.values()), sum(c.loss for c in chosen.values())
        assert loss == min(sum(c.loss for c in way) for way in every if sum(c.bytes for c in way) <= limit)
    assert spent > 944


def test_a_byte_counts_and_not_a_step() -> None:
    ways = {name: [Choice(32, 10, loss), Choice(16, 10 + more, 0.0)] for name, loss, more in
            (("large", 10.0, 100), ("one", 6.0, 45), ("two", 6.0, 45))}  # fmt: skip
    chosen = allocate(ways, 130)
    every = [way for way in itertools.product(*ways.values()) if sum(c.bytes for c in way) <= 130]
    assert sum(c.loss for c in chosen.values()) == min(sum(c.loss for c in way) for way in every) == 10.0
    assert chosen["large"].edge == 32


def test_more_bytes_never_make_it_worse_and_too_few_are_refused() -> None:
    ways = options()
    losses = [sum(c.loss for c in allocate(ways, limit).values()) for limit in (944, 4000, 20_000, 10**6)]
    assert losses == sorted(losses, reverse=True)
    assert {c.edge for c in allocate(ways, 10**6).values()} == {8}
    with pytest.raises(RbeError, match="allow more"):
        allocate(ways, 943)


class Planted(Pictures):
    """Images whose class only some inputs tell."""

    def __init__(self, config: Config) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(512, 1, 8, 8, generator=generator)
        y = (x[:, 0, 0, 0] > 0).long()
        images = (x, y)
        self.images = type("Images", (), {"train": images, "validation": images, "test": images, "black": 0.0})()


def test_sensitivity_is_measured_and_exceptions_keep_their_blocks() -> None:
    layer = (Layer("linear3", format="dense"), Layer("linear2", block=32))
    seeds = Seeds(bytes=3000, layer=layer)
    config = Config("b", Data(""), Model(widths=(64, 64, 32, 2)), seeds, Recipe(batch=64))
    shares = {share.name: share for share in budget.plan(config, Planted(config), None)}
    assert shares["linear2"].edge == 32
    assert "linear3" not in shares
    dense = 4 * 32 * 2
    assert sum(share.bytes for share in shares.values()) + dense <= 3000
    assert shares["linear1"].edge == 8  # what is left of 3,000 bytes: 64 blocks of 16 bytes
    assert all(share.sensitivity > 0 and share.loss > 0 for share in shares.values())
    network = plant(nn.Sequential(), Seeds())
    assert list(matrices(network)) == []


def test_a_teacher_of_the_same_shape_is_measured_itself(tmp_path: Path) -> None:
    config = Config("b", Data(""), Model(widths=(64, 64, 32, 2)), Seeds(bytes=3000), Recipe(batch=64))
    task = Planted(config)
    teacher = budget._reference(config, task, None)
    copy = budget._reference(config, task, teacher)
    assert copy is not teacher
    assert all(
        torch.equal(a, b) for a, b in zip(copy.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    assert all(p.requires_grad for p in copy.parameters())


def test_patterns() -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(2, 4, 3), nn.Embedding(8, 8), nn.LSTM(8, 8))
    seeds = Seeds(block=16, layer=(Layer("[01]", block=8), Layer("1", format="dense")))
    plant(network, seeds)
    assert [m.name for m in matrices(network)] == ["1"]
    assert network[0].spec.block == 8
    assert network[3].hh_l0.spec.block == 16
    with pytest.raises(RbeError, match="fits none"):
        plant(nn.Sequential(nn.Linear(2, 2)), Seeds(layer=(Layer("conv*", block=8),)))
    with pytest.raises(RbeError, match="cannot be dense while"):
        plant(nn.Sequential(nn.LSTM(8, 8)), Seeds(layer=(Layer("*.hh_l0", format="dense"),)))


@pytest.mark.parametrize(("columns", "cells"), [(784, 28), (3072, 1), (10, 1)])
def test_pixels_of_a_row_go_together_where_a_picture_is_square(columns: int, cells: int) -> None:
    network = plant(nn.Sequential(nn.Linear(columns, 8), nn.Linear(8, 4)), Seeds(format="stream", bytes=600))
    assert network[0].cells == cells and network[1].cells == 1


def test_the_forecast_knows_of_stages() -> None:
    weight = torch.randn(64, 64)
    assert budget._lost(weight, 16, 2) < 0.95 * budget._lost(weight, 16, 1)


def test_a_plan_of_stages_promises_less_loss() -> None:
    model, recipe = Model(widths=(64, 64, 2)), Recipe(batch=64)
    losses = []
    for stages in (1, 2):
        layer = (Layer("linear1", block=16, stages=stages),)
        config = Config("b", Data(""), model, Seeds(bytes=3000, layer=layer), recipe)
        losses.append(budget.plan(config, Planted(config), None)[0])
    one, two = losses
    assert one.name == two.name == "linear1"
    assert two.bytes == 2 * one.bytes
    assert two.loss / two.sensitivity < 0.95 * one.loss / one.sensitivity
