"""Positional encodings."""

import math

import pytest
import torch
from layer_cases import OPEN, close

import rbe.nn
from rbe.errors import RbeError
from rbe.nn.position import sinusoids


@pytest.mark.parametrize("d_model", [6, 7])
def test_sinusoids_are_the_printed_formula(d_model: int) -> None:
    table = sinusoids(torch.arange(9), d_model)
    assert table.shape == (9, d_model)
    for p in range(9):
        for k in range(d_model):
            angle = p / 10000 ** (2 * (k // 2) / d_model)
            assert float(table[p, k]) == pytest.approx(math.cos(angle) if k % 2 else math.sin(angle), abs=1e-12)


def test_sinusoids_stay_exact_far_out() -> None:
    x = torch.zeros(1, 4)
    y = rbe.nn.SinusoidalEncoding(4)(x, start=10**6)
    assert float(y[0, 0]) == pytest.approx(math.sin(10**6), abs=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_positions_run_along_the_sequence(batch_first: bool) -> None:
    layers = [
        rbe.nn.SinusoidalEncoding(6, batch_first=batch_first),
        rbe.nn.SeededEncoding(9, 6, batch_first=batch_first, format="packed128", block=4),
    ]
    x = torch.randn(2, 5, 6)
    for layer in layers:
        one = layer(x[0])
        many = layer(x if batch_first else x.transpose(0, 1))
        assert close((many if batch_first else many.transpose(0, 1))[0], one)
        assert close(torch.cat([layer(x[0][t : t + 1], start=t) for t in range(5)]), one)


@pytest.mark.parametrize("format", OPEN)
def test_the_table_is_learnt_and_is_one_matrix(format: str) -> None:
    torch.manual_seed(0)
    layer = rbe.nn.SeededEncoding(9, 6, **OPEN[format])
    x = torch.randn(5, 6)
    assert close(layer(x), x + layer.table.weight[:5])
    layer(x).sum().backward()
    assert layer.table.radius.grad is not None and bool(layer.table.radius.grad.any())


def test_bytes_of_the_paper() -> None:
    """000 section 5.7.2: one seed."""
    count = rbe.nn.count(rbe.nn.SeededEncoding(1024, 768, format="packed64", block=None))
    assert (count.seed_bytes, count.whole_bytes) == (8, 12)


def test_wrong_inputs_are_refused() -> None:
    layer = rbe.nn.SeededEncoding(9, 6, format="packed128")
    with pytest.raises(RbeError, match="positions 7 to 9 are asked for, but the table has 9"):
        layer(torch.randn(3, 6), start=7)
    with pytest.raises(RbeError, match="6 features"):
        layer(torch.randn(3, 5))
    with pytest.raises(RbeError, match="negative"):
        rbe.nn.SinusoidalEncoding(6)(torch.randn(3, 6), start=-1)


def test_integers_and_no_features_are_refused() -> None:
    for layer in (rbe.nn.SeededEncoding(10, 8, format="packed128"), rbe.nn.SinusoidalEncoding(8)):
        with pytest.raises(RbeError, match=r"x is torch\.int64"):
            layer(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(RbeError, match="0 features"):
        rbe.nn.SinusoidalEncoding(0)
