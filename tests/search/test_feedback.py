"""Error feedback: the output error never grows, white inputs change nothing, bad moments are refused."""

import pytest
import torch
from torch import Tensor

from rbe.errors import RbeError
from rbe.search import encode
from rbe.search.feedback import proxy_loss


def planted(columns: int, seed: int = 0) -> Tensor:
    """Second moments of correlated inputs: few strong directions, an offset, a little noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, columns, generator=g, dtype=torch.float64)
    x = x @ torch.diag(torch.linspace(0, -4, columns, dtype=torch.float64).exp())
    x = x @ torch.linalg.qr(torch.randn(columns, columns, generator=g, dtype=torch.float64))[0] + 0.3
    return x.T @ x / len(x) + 1e-3 * torch.eye(columns, dtype=torch.float64)


@pytest.mark.parametrize("bits", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("shape", [(48, 96), (33, 40)])
def test_output_error_shrinks(bits: float, shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    H = planted(shape[1])
    plain = proxy_loss(encode(W, bits=bits, effort="fast").decode() - W, H)
    better = proxy_loss(encode(W, bits=bits, effort="fast", moments=H).decode() - W, H)
    assert better < 0.8 * plain


def test_each_step_pays_and_seeds_are_what_was_measured() -> None:
    W, H = torch.randn(48, 96, generator=torch.Generator().manual_seed(1)), planted(96)
    plain, better = encode(W, effort="fast", rotate=False), encode(W, effort="fast", rotate=False, moments=H)
    loss = proxy_loss(better.decode() - W, H)
    assert loss < 0.33 * proxy_loss(plain.decode() - W, H)
    C = better.decode().double() / better.scale.double()
    best = float(((W.double() @ H) * C).sum() / ((C @ H) * C).sum())
    assert better.scale.item() == pytest.approx(best, rel=1e-4)


def test_rows_with_scales() -> None:
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 48)[:, None]
    H = planted(64)
    options = {"effort": "fast", "rotate": "in", "row_scale": True}
    plain = proxy_loss(encode(W, **options).decode() - W, H)
    assert proxy_loss(encode(W, **options, moments=H).decode() - W, H) < 0.8 * plain


def test_white_inputs_change_nothing() -> None:
    W = torch.randn(40, 72, generator=torch.Generator().manual_seed(2))
    plain, white = encode(W, effort="fast", rotate=False), encode(W, effort="fast", rotate=False, moments=torch.eye(72))
    assert torch.equal(plain.seeds, white.seeds)
    torch.testing.assert_close(plain.scale, white.scale)


def test_deterministic_and_scale_free() -> None:
    W, H = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)), planted(64)
    one, two = encode(W, effort="fast", moments=H), encode(1024 * W, effort="fast", moments=4 * H)
    assert torch.equal(one.seeds, encode(W, effort="fast", moments=H).seeds)
    assert torch.equal(one.seeds, two.seeds)
    assert two.scale.item() == pytest.approx(1024 * one.scale.item())


def test_zero_matrix() -> None:
    assert encode(torch.zeros(32, 32), effort="fast", moments=torch.eye(32)).scale == 0


@pytest.mark.parametrize(
    ("moments", "words"),
    [
        (torch.eye(31), "needs real"),
        (torch.eye(32).long(), "needs real"),
        (torch.full((32, 32), torch.nan), "NaN"),
        (-torch.eye(32), "positive definite"),
    ],
)
def test_bad_moments(moments: Tensor, words: str) -> None:
    with pytest.raises(RbeError, match=words):
        encode(torch.ones(32, 32), effort="fast", moments=moments)


def test_only_a_trellis() -> None:
    with pytest.raises(RbeError, match="trellis"):
        encode(torch.ones(32, 32), format="packed64", moments=torch.eye(32))
