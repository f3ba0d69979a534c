"""`encode` on all kinds of matrices: what it promises about errors, scales, shapes and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rbe.errors import RbeError
from rbe.formats import trellis
from rbe.search import encode
from rbe.search.viterbi import Encoded, encode_trellis


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded_error(W: torch.Tensor, result: Encoded) -> float:
    W = W.double()
    return ((result.matrix.decode().double() - W).square().sum() / W.square().sum()).item()


@pytest.mark.parametrize("bits", trellis.BITS)
@pytest.mark.parametrize(
    "options", [{}, {"rotate": False}, {"rotate": "in", "row_scale": True}], ids=["both", "none", "rows"]
)
def test_reported_error_is_the_error_of_decoding(bits: float, options: dict) -> None:
    W = 0.02 * gaussian(75, 90, seed=int(2 * bits))
    result = encode_trellis(W, bits=bits, effort="fast", **options)
    assert result.error == pytest.approx(decoded_error(W, result), rel=1e-4)


# Measured on 64 Gaussian blocks: the bound leaves 3 %, which is three deviations of the sample.
@pytest.mark.parametrize(
    ("effort", "bits", "bound"),
    [("fast", 2, 0.0765), ("fast", 0.5, 0.56), ("fast", 4, 0.0054), ("balanced", 2, 0.0713), ("balanced", 4, 0.00465)],
)
def test_error_of_gaussian_weights(effort: str, bits: float, bound: float) -> None:
    error = encode_trellis(gaussian(128, 128), bits=bits, effort=effort).error
    assert 2 ** (-2 * bits) < error < bound


def test_more_effort_is_better() -> None:
    W = gaussian(64, 64)
    errors = [encode_trellis(W, bits=1, effort=effort).error for effort in ("fast", "balanced", "best")]
    assert errors[0] > errors[1] > errors[2]


def test_best_window_and_starts_reach_the_matrix() -> None:
    W = gaussian(16, 16)
    assert [encode(W, effort=effort).spec.window for effort in ("fast", "balanced", "best")] == [12, 16, 16]
    assert encode(W, effort="fast", window=14).spec.window == 14


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    bits=st.sampled_from(trellis.BITS),
    options=st.sampled_from([{}, {"rotate": False}, {"rotate": "in"}, {"rotate": "in", "row_scale": True}]),
    power=st.integers(-38, 30),
    seed=st.integers(0, 2**40),
)
def test_any_shape_and_size(rows: int, columns: int, bits: float, options: dict, power: int, seed: int) -> None:
    W = gaussian(rows, columns, seed=seed) * 10.0**power
    result = encode_trellis(W, bits=bits, effort="fast", seed=seed, **options)
    assert result.matrix.shape == (rows, columns)
    assert result.matrix.spec.bits == bits
    assert result.error <= 1.0
    if power > -36:  # below, float32 products lose their digits
        assert result.error == pytest.approx(decoded_error(W, result), rel=1e-3, abs=1e-6)
        # The mean over few weights scatters around what the code can do: by sqrt(2 / n) of it, as squares do.
        chance = 1 + 4 * (2 / (rows * columns)) ** 0.5
        assert result.error < 1.1 * 2 ** (-2 * bits) * chance + 0.1


@pytest.mark.parametrize(
    "W",
    [
        torch.full((33, 20), 0.37),
        torch.full((16, 16), -1e37),
        torch.full((16, 16), 1e-45),
        torch.eye(40),
        torch.cat([torch.zeros(1, 63), torch.full((1, 1), 7.0)], 1),
        gaussian(20, 20) * 1e-43,
        gaussian(50, 20).pow(9),
        torch.tensor([[5.0]]),
    ],
    ids=["constant", "huge", "smallest", "identity", "spike", "denormal", "heavy tails", "1x1"],
)
@pytest.mark.parametrize("rotate", [True, False])
def test_never_worse_than_zero(W: torch.Tensor, rotate: bool) -> None:
    for bits in (0.5, 2, 4):
        result = encode_trellis(W, bits=bits, effort="fast", rotate=rotate)
        assert 0.0 <= result.error <= 1.0
        assert torch.isfinite(result.matrix.decode()).all()
        assert decoded_error(W, result) <= 1.0 + 1e-5


def test_a_constant_needs_few_bits() -> None:
    assert encode_trellis(torch.full((64, 64), 0.37), bits=2, effort="fast", rotate=False).error < 0.05


def test_the_scale_search_leaves_the_gaussian_start_when_it_should() -> None:
    # Heavy tails: the Gaussian start gives 0.27.
    assert encode_trellis(gaussian(64, 64).pow(3), bits=2, effort="fast", rotate=False).error < 0.24


@pytest.mark.parametrize("row_scale", [True, False])
def test_a_zero_matrix_has_scale_zero(row_scale: bool) -> None:
    result = encode_trellis(torch.zeros(20, 30), rotate="in", row_scale=row_scale)
    assert result.error == 0.0 and result.matrix.scale == 0.0
    assert not result.matrix.decode().any()


def test_row_scales_serve_small_rows_as_well_as_large_ones() -> None:
    factors = torch.logspace(-5, 5, 48)[:, None]
    W = gaussian(48, 128) * factors
    decoded = encode(W, bits=2, effort="fast", rotate="in", row_scale=True).decode()
    errors = (decoded - W).square().mean(1) / W.square().mean(1)
    assert errors.max() < 0.12


def test_rows_too_small_for_their_scale_become_zero() -> None:
    W = gaussian(32, 32)
    W[3] = 0.0
    W[5] *= 1e-20
    result = encode_trellis(W, effort="fast", rotate="in", row_scale=True)
    assert result.matrix.row_scale is not None
    assert (result.matrix.row_scale == 0).nonzero().flatten().tolist() == [3, 5]
    decoded = result.matrix.decode()
    assert not decoded[3].any() and not decoded[5].any()
    assert result.error < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_encoded_by_value_and_left_alone(dtype: torch.dtype) -> None:
    W = gaussian(20, 30).to(dtype)
    before = W.clone()
    a, b = encode(W, effort="fast"), encode(W.float(), effort="fast")
    assert torch.equal(a.seeds, b.seeds) and torch.equal(a.scale, b.scale)
    assert torch.equal(W, before)


def test_strided_and_trained_parameters_are_accepted() -> None:
    W = torch.nn.Parameter(gaussian(30, 20)).T
    assert torch.equal(encode(W, effort="fast").seeds, encode(W.detach().contiguous(), effort="fast").seeds)


def test_rotation_follows_the_seed_and_the_sides() -> None:
    W = gaussian(20, 30)
    specs = [encode(W, effort="fast", seed=seed).spec for seed in (0, 0, 1, -2, 2**31 - 1)]
    assert specs[0] == specs[1] and len({spec.rotation for spec in specs}) == 4
    assert all(side and out != side for out, side in (spec.rotation for spec in specs))
    assert encode(W, effort="fast", rotate="in").spec.rotation == (0, specs[0].rotation[1])
    assert encode(W, effort="fast", rotate=False).spec.rotation == (0, 0)
    assert encode(W[:1], effort="fast").spec.rotation[0] == 0
    assert encode(W[:, :1], effort="fast").spec.rotation[1] == 0


def test_rotation_makes_outliers_harmless() -> None:
    W = gaussian(64, 64)
    W[:, 5] *= 60.0
    assert encode_trellis(W, effort="fast").error < 0.08 < encode_trellis(W, effort="fast", rotate=False).error


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_matrix(threads: int) -> None:
    W = gaussian(70, 90)
    a, b = encode(W, effort="fast"), encode(W, effort="fast", threads=threads)
    assert torch.equal(a.seeds, b.seeds) and torch.equal(a.scale, b.scale) and a.spec == b.spec


def test_progress_counts_weights_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    encode(gaussian(100, 50), effort="fast", progress=lambda *p: seen.append(p))
    assert seen[-1] == (5000, 5000) and seen == sorted(seen)


def bad_at(value: float) -> torch.Tensor:
    W = gaussian(20, 30)
    W[7, 11] = value
    return W


@pytest.mark.parametrize(
    ("W", "options", "message"),
    [
        (torch.zeros(2, 3, 4), {}, r"3-D \(2, 3, 4\); a seed matrix is 2-D"),
        (torch.zeros(5), {}, "1-D"),
        (torch.zeros(0, 4), {}, r"\(0, 4\) is empty"),
        (torch.zeros(4, 4, dtype=torch.int8), {}, "torch.int8; real floating-point"),
        (torch.zeros(4, 4, dtype=torch.complex64), {}, "torch.complex64; real floating-point"),
        (torch.zeros(4, 4, device="meta"), {}, "meta device"),
        (bad_at(math.nan), {}, r"entry \(7, 11\) of the matrix \(20, 30\) is nan"),
        (bad_at(-math.inf), {}, r"entry \(7, 11\) .* is -inf"),
        (torch.full((2, 2), 1e300, dtype=torch.float64), {}, r"entry \(0, 0\) .* is 1e\+300, beyond float32"),
        (torch.ones(4, 4), {"bits": 2.25}, "choose one of 0.5, 1, 1.5, 2"),
        (torch.ones(4, 4), {"effort": "heroic"}, "'heroic' is not offered; choose one of fast, balanced, best"),
        (torch.ones(4, 4), {"format": "gptq"}, "'gptq' is not known; this version has .*trellis"),
        (torch.ones(4, 4), {"window": 13}, "window 13 is not offered"),
        (torch.ones(4, 4), {"rotate": "out"}, "rotate='out' is not offered"),
        (torch.ones(4, 4), {"rotate": True, "row_scale": True}, "row_scale with both sides rotated"),
        (torch.ones(4, 4), {"threads": 0}, "0 threads"),
    ],
)
def test_bad_input_is_refused(W: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(RbeError, match=message):
        encode(W, **options)


def test_what_may_be_overwritten_gives_the_same_seeds() -> None:
    """Contiguous or not; a matrix that may not be is left alone."""
    W = gaussian(48, 64)
    before = W.clone()
    wanted = encode(W, effort="fast", seed=3)
    assert torch.equal(W, before)
    with torch.inference_mode():
        unchangeable = W.clone()
    for source in (W.clone(), W.T.clone().T, W.double(), unchangeable):
        assert torch.equal(encode(source, effort="fast", seed=3, overwrite=True).seeds, wanted.seeds)
    graded = [
        encode(
            W.clone(), bits=((16, 3.0), (48, 1.0)), effort="fast", rotate="in", row_scale=True, overwrite=given
        ).seeds
        for given in (False, True)
    ]
    assert torch.equal(*graded)
