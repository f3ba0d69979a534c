"""Bounds on rounding hold for what the kernels compute, and Jacobians are those of autograd."""

import pytest
import torch

from rbe import formats, metrics
from rbe.search import encode
from rbe.stability import stability

SETTINGS = [
    {"format": "packed64"},
    {"format": "packed64", "precision": 64},
    {"format": "packed64", "block": None},
    {"format": "packed128"},
    {"format": "packed128", "mode": "faithful"},
    {"format": "packed128", "stages": 2},
    {"format": "packed128", "block": 4},
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(map(str, options.values())))
def test_weights_are_within_their_bounds(options: dict[str, object]) -> None:
    W = torch.randn(48, 40, generator=torch.Generator().manual_seed(0)).cumsum(0)
    matrix = encode(W, effort="fast", **options)  # type: ignore[arg-type]
    found, spec = stability(matrix), matrix.spec
    assert found is not None and found.rank == (1 if spec.format == "packed64" else found.rank)
    definition = formats.disk(spec.format)
    code, radius, angle = (t if t.dtype == torch.int64 else t.double() for t in definition.split(matrix.seeds, spec))
    # Computed: the kernels' float32 beside float64, from the same fields.
    exact = definition.generate(matrix.seeds, spec)
    rows, columns = spec.grid
    exact = exact.reshape(rows, columns, *spec.block_shape).transpose(1, 2).reshape(spec.padded)[:48, :40]
    computed = (matrix.decode().double() - exact * matrix.scale.double()).abs().max().item()
    assert computed <= found.weight - found.storage
    # Stored: r and theta cut to fewer digits than float64 has.
    worst = metrics.jacobian(
        max(
            (
                torch.stack([d[b, s].flatten() for d in definition.derivatives(code, radius, angle, spec)], 1)
                for b in range(spec.blocks)
                for s in range(spec.stages)
            ),
            key=lambda block: metrics.jacobian(block).largest,
        )
    )
    assert found.largest == pytest.approx(worst.largest * abs(matrix.scale.item()), rel=1e-6)
    assert found.rank == worst.rank and 0 < found.storage < found.weight < 1e-3 * W.abs().max().item()


def test_other_formats_have_none() -> None:
    assert stability(encode(torch.randn(32, 32), format="outer128")) is None
