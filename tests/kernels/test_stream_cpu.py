"""The C++ coder of `stream` against the definition: equal bytes, equal levels, equal refusals."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.formats import stream as definition
from rbe.kernels import stream

GOLDEN = Path(__file__).parent.parent / "golden" / "stream.json"


def sparse(rows: int, columns: int, share: float, seed: int) -> Tensor:
    rng = random.Random(seed)
    sizes = (1, 1, 1, 2, 3, 9, 40, definition.LARGEST)
    cells = [rng.choice((-1, 1)) * rng.choice(sizes) if rng.random() < share else 0 for _ in range(rows * columns)]
    return torch.tensor(cells).view(rows, columns)


@pytest.mark.parametrize(("rows", "columns", "cells"), [(1, 1, 1), (9, 12, 4), (40, 300, 25), (300, 37, 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 1.0])
def test_bytes_and_levels_are_those_of_the_definition(
    rows: int, columns: int, cells: int, bias: bool, share: float
) -> None:
    levels = sparse(rows, columns + bias, share, seed=rows)
    levels[:, :: max(2, columns // 9)] = 0  # so that marks pay
    seed = definition.pack(levels, cells=cells, bias=bias)
    assert torch.equal(stream.pack(levels, cells=cells, bias=bias), seed)
    again = stream.unpack(seed, (rows, columns), cells=cells, bias=bias)
    assert again.dtype == torch.int16
    assert torch.equal(again, levels.to(torch.int16))


def test_any_bytes_are_the_levels_of_the_definition_or_refused_alike() -> None:
    for k in range(60):
        seed = torch.tensor(list(random.Random(k).randbytes(k)), dtype=torch.uint8)
        made: list[Tensor | str] = []
        for unpack in (definition.unpack, stream.unpack):
            try:
                made.append(unpack(seed, (9, 12), cells=4, bias=True))
            except RbeError as told:
                made.append(str(told))
        first, second = made
        both = isinstance(first, Tensor) and isinstance(second, Tensor)
        assert torch.equal(first, second) if both else first == second


def test_golden_bytes() -> None:
    for case in json.loads(GOLDEN.read_text()):
        levels, form = torch.tensor(case["levels"]), {"cells": case["cells"], "bias": case["bias"]}
        assert stream.pack(levels, **form).tolist() == case["seed"]
        shape = (levels.shape[0], levels.shape[1] - case["bias"])
        assert stream.unpack(torch.tensor(case["seed"], dtype=torch.uint8), shape, **form).tolist() == case["levels"]


@pytest.mark.parametrize("pack", [definition.pack, stream.pack])
def test_levels_that_have_no_opposite_are_refused(pack) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RbeError, match="32768"):
        pack(torch.full((2, 3), -32768, dtype=torch.int16))
