"""`rbe.nn.Embedding`: rows on demand, never the table."""

import copy

import pytest
import torch
from test_linear import random_matrix
from torch import nn

import rbe.nn
from rbe import kernels
from rbe.errors import RbeError


@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_equal_the_dense_table(row_scale: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = random_matrix(100, 24, rotation=(0, 9), row_scale=row_scale)
    layer = rbe.nn.Embedding.from_matrix(matrix)
    index = torch.randint(0, 100, shape, dtype=dtype)
    rows = layer(index)
    expected = nn.functional.embedding(index, matrix.decode())
    assert rows.shape == expected.shape and rows.dtype == torch.float32
    assert torch.allclose(rows, expected, atol=1e-6)


def test_the_table_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the whole table was decoded")

    layer = rbe.nn.Embedding.from_matrix(random_matrix(100, 24, rotation=(0, 9)))
    monkeypatch.setattr(kernels, "decode", forbidden)
    monkeypatch.setattr(kernels.reference, "decode", forbidden)
    assert layer(torch.tensor([1, 99])).shape == (2, 24)


@pytest.mark.parametrize("index", [100, -1])
def test_an_index_outside_is_refused(index: int) -> None:
    layer = rbe.nn.Embedding.from_matrix(random_matrix(100, 24, rotation=(0, 9)))
    with pytest.raises(RbeError, match="indices run"):
        layer(torch.tensor([0, index]))


def test_a_float_index_is_refused() -> None:
    layer = rbe.nn.Embedding.from_matrix(random_matrix(100, 24, rotation=(0, 9)))
    with pytest.raises(RbeError):
        layer(torch.tensor([0.5]))


def test_padding_is_checked_and_kept() -> None:
    assert rbe.nn.Embedding(100, 24, padding_idx=-1).padding_idx == nn.Embedding(100, 24, padding_idx=-1).padding_idx
    with pytest.raises(RbeError, match="padding_idx 100"):
        rbe.nn.Embedding(100, 24, padding_idx=100)


def test_mixed_rows_are_refused() -> None:
    with pytest.raises(RbeError, match="rotate='in'"):
        rbe.nn.Embedding.from_matrix(random_matrix(100, 24, rotation=(3, 9)))


def test_casts_change_the_rows_and_nothing_stored() -> None:
    matrix = random_matrix(100, 24, rotation=(0, 9), row_scale=True)
    layer = copy.deepcopy(rbe.nn.Embedding.from_matrix(matrix)).to(torch.bfloat16)
    assert layer(torch.tensor([3])).dtype == torch.bfloat16
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in matrix.to_tensors().items())


def test_tied_table_reads_its_owner() -> None:
    owner = rbe.nn.Embedding.from_matrix(random_matrix(100, 24, rotation=(0, 9), row_scale=True))
    tied = rbe.nn.Embedding.tied(owner, padding_idx=0)
    index = torch.tensor([[0, 99]])
    assert torch.equal(tied(index), owner(index)) and tied.state_dict() == {}
