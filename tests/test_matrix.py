"""`SeedMatrix`: parts that fit, parts that do not, and what it counts."""

import copy
import pickle

import pytest
import torch

from rbe import kernels
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix

SEEDS = torch.randint(-(2**63), 2**63 - 1, (6, 8), generator=torch.Generator().manual_seed(0))


def matrix(**changes: object) -> SeedMatrix:
    parts = {"shape": (20, 33), "format": "trellis", "scale": 0.01, "rotation": (3, 5)} | changes
    return SeedMatrix.from_seeds(SEEDS.clone(), **parts)  # type: ignore[arg-type]


def test_product_is_that_of_the_decoded_matrix() -> None:
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(1))
    m = matrix()
    assert torch.allclose(m.matmul(x), x @ m.decode().T, atol=1e-4)
    assert torch.allclose(m.matmul(x, "int8"), x @ m.decode().T, atol=1.0)
    assert not torch.equal(m.matmul(x, "int8"), m.matmul(x))


def test_rows_are_those_of_the_decoded_matrix() -> None:
    m = matrix(rotation=(0, 5), row_scale=torch.linspace(0.5, 1.5, 20).half())
    index = torch.tensor([[19, 0], [3, 3]])
    assert torch.equal(m.rows(index), m.decode()[index])


def test_sizes_count_everything() -> None:
    m = matrix(rotation=None, row_scale=torch.ones(20).half())
    assert m.nbytes == 6 * 64 + 4 + 40
    assert m.bits_per_weight == 8 * 428 / 660
    assert m.shape == (20, 33)


def test_tensors_come_and_go() -> None:
    m = matrix(rotation=(0, 5), row_scale=torch.linspace(0.5, 1.5, 20).half())
    again = SeedMatrix.from_tensors(m.to_tensors(), m.spec)
    assert torch.equal(again.decode(), m.decode())
    assert set(matrix().to_tensors()) == {"seeds", "scale"}
    with pytest.raises(RbeError, match=r"\['scale'\] missing"):
        SeedMatrix.from_tensors({"seeds": SEEDS}, m.spec)


def test_changes_in_place_are_seen() -> None:
    m = matrix()
    x = torch.ones(33)
    before = m.matmul(x)
    m.scale.mul_(2)
    assert torch.equal(m.matmul(x), 2 * before)


def test_a_used_matrix_can_be_copied() -> None:
    m = matrix()
    x = torch.ones(33)
    y = m.matmul(x)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other.matmul(x), y)
        assert other.seeds.data_ptr() != m.seeds.data_ptr()


def test_zero_scale_is_a_zero_matrix() -> None:
    m = matrix(scale=0.0)
    assert not m.decode().any()
    assert not m.matmul(torch.ones(33)).any()


def test_an_unused_matrix_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    prepare = kernels.prepare
    monkeypatch.setattr(kernels, "prepare", lambda *parts: calls.append(1) or prepare(*parts))
    m = matrix()
    assert not calls
    m.matmul(torch.ones(33)), m.matmul(torch.ones(33))
    assert len(calls) == 1


def test_parts_that_do_not_fit() -> None:
    spec = SeedSpec("trellis", (20, 33), bits=2)
    one, half = torch.tensor(1.0), torch.ones(20).half()
    cases = [
        ("seeds are torch.int64", (SEEDS[:5], one, None)),
        ("seeds are torch.float64", (SEEDS.double(), one, None)),
        ("must be one 0-d float32", (SEEDS, one.reshape(1), None)),
        ("must be one 0-d float32", (SEEDS, one.double(), None)),
        (r"must be float16 \(20,\)", (SEEDS, one, half[:3])),
        (r"must be float16 \(20,\)", (SEEDS, one, half.float())),
        ("NaN or infinite", (SEEDS, one * torch.nan, None)),
        ("NaN or infinite", (SEEDS, one, half * torch.inf)),
    ]
    for message, (seeds, scale, row_scale) in cases:
        with pytest.raises(RbeError, match=message):
            SeedMatrix(spec, seeds, scale, row_scale)
    with pytest.raises(RbeError, match="has no meaning"):
        matrix(row_scale=half)
    with pytest.raises(RbeError, match="must be int64"):
        SeedMatrix.from_seeds(SEEDS[0], (20, 33), "trellis")
    with pytest.raises(RbeError, match="not offered"):
        SeedMatrix.from_seeds(SEEDS[:, :7], (20, 33), "trellis")


@pytest.mark.parametrize("scale", [torch.ones(2), "x", None, [1.0, 2.0]])
def test_a_scale_is_one_number(scale: object) -> None:
    with pytest.raises(RbeError, match=r"scale .* is not one number"):
        matrix(scale=scale)
