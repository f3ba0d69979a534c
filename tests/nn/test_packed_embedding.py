"""`rbe.nn.Embedding` in the packed formats."""

import pytest
import torch
from layer_cases import EVERY, OPEN, close
from torch import nn

import rbe.nn
from rbe.errors import RbeError


@pytest.mark.parametrize("format", EVERY)
def test_rows_equal_those_of_the_dense_table(format: str) -> None:
    torch.manual_seed(0)
    table = rbe.nn.Embedding(11, 6, **{**EVERY[format], "rotation": (0, 0)})
    index = torch.tensor([[0, 10], [3, 3]])
    expected = nn.functional.embedding(index, table.weight)
    assert close(table(index), expected)
    assert close(table.freeze()(index), expected)


@pytest.mark.parametrize("format", OPEN)
def test_gradients_of_repeated_rows_add_up(format: str) -> None:
    torch.manual_seed(0)
    table = rbe.nn.Embedding(11, 6, **OPEN[format])
    index, g = torch.tensor([4, 4, 9]), torch.randn(3, 6)
    table(index).backward(g)
    by_rows = table.radius.grad.clone() if table.radius.grad is not None else torch.empty(0)
    table.zero_grad()
    dense = torch.zeros(11, 6).index_add_(0, index, g)
    table.dense().backward(dense)
    assert table.radius.grad is not None and close(by_rows, table.radius.grad, 1e-4)


def test_bytes_of_the_paper() -> None:
    """000 section 5.6.2: 8 bytes, V d / 2 to 1, the scale not counted."""
    count = rbe.nn.count(rbe.nn.Embedding(1000, 64, format="packed64", block=None))
    assert (count.seed_bytes, count.whole_bytes, count.printed_ratio) == (8, 12, 1000 * 64 / 2)


def test_an_index_outside_is_refused() -> None:
    for layer in (rbe.nn.Embedding(11, 6, format="packed128"), rbe.nn.Embedding(11, 6, format="packed128").freeze()):
        with pytest.raises(RbeError, match="11"):
            layer(torch.tensor([3, 11]))
