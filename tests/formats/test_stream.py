"""The format `stream`: a code without loss, short where levels are rare, the same bytes for ever."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.formats import stream
from rbe.kernels.stream import pack

GOLDEN = Path(__file__).parent.parent / "golden" / "stream.json"
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 1, 1), (20, 25, 25), (30, 64, 16), (10, 100, 7)]


def sparse(rows: int, columns: int, share: float, seed: int = 0, largest: int = 4) -> Tensor:
    """Levels of which a share is not 0, from Python's generator: the same on every machine."""
    rng = random.Random(seed)

    def level() -> int:
        return rng.choice((-1, 1)) * rng.randint(1, largest) if rng.random() < share else 0

    return torch.tensor([[level() for _ in range(columns)] for _ in range(rows)])


@pytest.mark.parametrize(("rows", "columns", "cells"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 1.0])
def test_levels_come_back(rows: int, columns: int, cells: int, bias: bool, share: float) -> None:
    levels = sparse(rows, columns + bias, share, seed=rows)
    seed = stream.pack(levels, cells=cells, bias=bias)
    again = stream.unpack(seed, (rows, columns), cells=cells, bias=bias)
    assert again.dtype == torch.int16
    assert torch.equal(again, levels.to(torch.int16))
    assert torch.equal(stream.pack(again, cells=cells, bias=bias), seed)


def test_the_largest_levels_come_back() -> None:
    levels = torch.tensor([[stream.LARGEST, 0, -stream.LARGEST], [1, -1, 254]])
    assert torch.equal(stream.unpack(stream.pack(levels), (2, 3)), levels.to(torch.int16))


def test_any_bytes_are_levels() -> None:
    for k in range(40):
        seed = torch.tensor(list(random.Random(k).randbytes(k)), dtype=torch.uint8)
        try:
            levels = stream.unpack(seed, (9, 12), cells=4, bias=True)
        except RbeError as told:
            assert "full after" in str(told)
        else:
            assert levels.shape == (9, 13)
            assert int(levels.abs().max()) <= stream.LARGEST


def test_nothing_costs_nothing_and_rare_levels_cost_little() -> None:
    assert len(stream.pack(torch.zeros(500, 800, dtype=torch.int64), cells=16)) < 8
    # Entropy of the places of 1 % of 20,000 and a sign each: 1,616 + 200 bits; what is learned on the way comes on top.
    levels = sparse(100, 200, 0.01, largest=1)
    count = int(levels.count_nonzero())
    bits = 20000 * (-(p := count / 20000) * torch.tensor(p).log2() - (1 - p) * torch.tensor(1 - p).log2()) + count
    assert 0.9 * bits < 8 * len(stream.pack(levels)) < 1.3 * bits


def test_levels_without_structure_cost_their_entropy() -> None:
    """The views of a place do not drift apart where next to nothing happens for long."""
    levels = sparse(1000, 200, 0.005, largest=1)
    count = int(levels.count_nonzero())
    p = torch.tensor(count / 200_000)
    bits = 200_000 * float(-p * p.log2() - (1 - p) * (1 - p).log2()) + count
    assert 8 * len(pack(levels)) < 1.08 * bits


@pytest.mark.parametrize(
    "pattern",
    [
        lambda a: a[:, ::2].zero_(),  # columns
        lambda a: a.view(40, 8, 15)[:, ::2].zero_(),  # groups
        lambda a: a.view(40, 8, 15)[..., 5:].zero_(),  # cells of every group
    ],
)
def test_structure_makes_a_stream_shorter(pattern) -> None:  # type: ignore[no-untyped-def]
    levels = sparse(40, 120, 0.2, largest=1)
    pattern(levels)
    mixed = levels.flatten()[torch.randperm(4800, generator=torch.Generator().manual_seed(0))].view(40, 120)
    assert len(stream.pack(levels, cells=15)) < 0.9 * len(stream.pack(mixed, cells=15))


def test_bytes_are_the_same_for_ever() -> None:
    for case in json.loads(GOLDEN.read_text()):
        levels = torch.tensor(case["levels"])
        shape = (levels.shape[0], levels.shape[1] - case["bias"])
        form = {"cells": case["cells"], "bias": case["bias"]}
        assert stream.pack(levels, **form).tolist() == case["seed"]
        assert stream.unpack(torch.tensor(case["seed"], dtype=torch.uint8), shape, **form).tolist() == case["levels"]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (torch.zeros(2, 3), "whole numbers"),
        (torch.zeros(3, dtype=torch.int64), "matrix"),
        (torch.zeros(0, 3, dtype=torch.int64), "positive sides"),
        (torch.full((2, 3), 256), "at most 255"),
    ],
)
def test_what_is_no_matrix_of_levels_is_refused(levels: Tensor, message: str) -> None:
    with pytest.raises(RbeError, match=message):
        stream.pack(levels)


def test_seeds_of_another_kind_or_length_are_refused() -> None:
    with pytest.raises(RbeError, match="uint8"):
        stream.unpack(torch.zeros(4, dtype=torch.int64), (2, 3))
    with pytest.raises(RbeError, match="full after"):
        stream.unpack(torch.full((99,), 85, dtype=torch.uint8), (2, 3))
    with pytest.raises(RbeError, match="groups of 4"):
        stream.unpack(torch.zeros(1, dtype=torch.uint8), (2, 3), cells=4)
