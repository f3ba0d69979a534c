"""Tables encoded in grades: each row range as well as its rate allows, and all of it in one matrix."""

import pytest
import torch

from rbe import encode
from rbe.errors import RbeError
from rbe.matrix import SeedMatrix
from rbe.search import viterbi

GRADES = ((64, 3.0), (128, 2.0), (200, 0.5))


def _table() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(200, 64, generator=g) * torch.linspace(0.1, 3, 200)[:, None]


def _encode(W: torch.Tensor, **options: object) -> SeedMatrix:
    return encode(W, bits=GRADES, effort="fast", rotate="in", row_scale=True, **options)  # type: ignore[arg-type]


def test_every_grade_has_the_error_of_its_rate() -> None:
    W = _table()
    m = _encode(W)
    assert m.seeds.shape == (4 * (4 * 6 + 4 * 4 + 5), 2) and m.spec.grades == GRADES
    difference = (m.decode() - W).square().sum(1) / W.square().sum(1)
    for (begin, end), bits in zip(((0, 64), (64, 128), (128, 200)), (3.0, 2.0, 0.5), strict=True):
        alone = viterbi.encode_trellis(W[begin:end], bits, "fast", "in", True).error
        assert difference[begin:end].mean() == pytest.approx(alone, rel=0.1)
    assert torch.allclose(m.rows(torch.tensor([3, 199])), m.decode()[[3, 199]], atol=1e-5)


def test_deterministic_whatever_the_threads() -> None:
    one, two = _encode(_table(), threads=1), _encode(_table(), threads=3)
    assert torch.equal(one.seeds, two.seeds) and torch.equal(one.row_scale, two.row_scale)
    assert not torch.equal(one.seeds, _encode(_table(), seed=1).seeds)


def test_zero_and_silent_grades() -> None:
    assert not _encode(torch.zeros(200, 64)).decode().any()
    W = _table()
    W[64:128] = 0
    decoded = _encode(W).decode()
    assert not decoded[64:128].any() and (decoded - W).norm() < 0.75 * W.norm()


def test_progress_counts_all_grades() -> None:
    seen: list[tuple[int, int]] = []
    _encode(_table(), progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {200 * 64} and seen[-1][0] == 200 * 64
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rotate": True, "row_scale": False}, "rotate='in'"),
        ({"row_scale": False}, "row_scale"),
        ({"format": "packed64"}, "belong to a trellis"),
        ({"moments": torch.eye(64)}, "moments and grades"),
        ({"effort": "slow"}, "effort"),
    ],
)
def test_what_cannot_be_graded(options: dict, words: str) -> None:
    settings = {"bits": GRADES, "effort": "fast", "rotate": "in", "row_scale": True, **options}
    with pytest.raises(RbeError, match=words):
        encode(_table(), **settings)


def test_matrices_that_do_not_fit() -> None:
    for W in (torch.randn(199, 64), torch.randn(5), torch.empty(0, 64)):
        with pytest.raises(RbeError, match=r"grade|matrix"):
            _encode(W)
