"""Norms: equal to torch's given the same gain and shift, dense or from seeds; the printed forms; folding."""

import dataclasses
from typing import Any

import pytest
import torch
from layer_cases import NO_VECTORS, OPEN, close
from torch import Tensor, nn

import rbe.nn
from rbe.errors import RbeError
from rbe.nn.norm import Affine
from rbe.outliers import Outliers


def given(torchs: nn.Module, ours: Affine) -> nn.Module:
    """Torch's norm with our gain and shift."""
    with torch.no_grad():
        for parameter, value in ((torchs.weight, ours.gain()), (getattr(torchs, "bias", None), ours.shift())):
            if parameter is not None and value is not None:
                parameter.copy_(value)  # type: ignore[operator]
    return torchs


def grown(norm: Affine) -> Affine:
    """Gains and shifts far from 1 and 0."""
    with torch.no_grad():
        for seed in (norm.weight_seed, norm.bias_seed):
            if seed is not None:
                seed.scale.mul_(20)
        for dense in (norm.weight, norm.bias):
            if dense is not None:
                dense.normal_()
    return norm


@pytest.mark.parametrize("format", ["dense", *(f for f in OPEN if f != "faithful" and f not in NO_VECTORS)])
def test_norms_equal_torchs_with_gradients(format: str) -> None:
    torch.manual_seed(0)
    options = {"parameters": "dense"} if format == "dense" else {"parameters": "seed", **OPEN[format]}
    shape = (3, 4)
    pairs = [
        (rbe.nn.LayerNorm(shape, 1e-3, **options), nn.LayerNorm(shape, 1e-3), (5, *shape)),
        (rbe.nn.RMSNorm(shape, **options), nn.RMSNorm(shape), (5, *shape)),
        (rbe.nn.BatchNorm1d(4, **options), nn.BatchNorm1d(4), (5, 4, 3)),
        (rbe.nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4), (5, 4, 3, 2)),
    ]
    for ours, torchs, sides in pairs:
        grown(ours)
        given(torchs, ours)
        x = torch.randn(sides, requires_grad=True)
        y, expected = ours(x), torchs(x)
        g = torch.randn_like(y)
        assert close(y, expected)
        (mine,) = torch.autograd.grad(y, x, g)
        (theirs,) = torch.autograd.grad(expected, x, g)
        assert close(mine, theirs, 1e-4)


def test_the_running_statistics_are_torchs() -> None:
    for momentum in (0.3, None):
        ours, torchs = rbe.nn.BatchNorm1d(4, momentum=momentum), nn.BatchNorm1d(4, momentum=momentum)
        for _ in range(3):
            x = 2 * torch.randn(6, 4) + 1
            assert close(ours(x), torchs(x))
        for name, buffer in torchs.named_buffers():
            assert torch.equal(ours.get_buffer(name), buffer), name
        assert close(ours.eval()(x), torchs.eval()(x))
        assert sorted(ours.state_dict()) == sorted(torchs.state_dict())


def test_epsilon_stands_inside_the_root() -> None:
    x = torch.full((1, 8), 1e-3)
    assert float(rbe.nn.RMSNorm(8, 1e-5)(x)[0, 0].detach()) == pytest.approx(1e-3 / (1e-6 + 1e-5) ** 0.5)
    assert float(rbe.nn.RMSNorm(8, 1e-5, mode="faithful")(x)[0, 0].detach()) == pytest.approx(1e-3 / (1e-3 + 1e-5))


@pytest.mark.parametrize("options", [{"format": "packed64", "mode": "faithful"}, OPEN["faithful"]])
def test_the_printed_forms(options: dict[str, object]) -> None:
    """000 sections 5.4.2 and 5.4.3: the gain is the value of the seed, and epsilon stands beside the root."""
    torch.manual_seed(0)
    norm = rbe.nn.LayerNorm(6, 0.1, parameters="seed", **options)  # type: ignore[arg-type]
    x = torch.randn(4, 6)
    assert norm.weight_seed is not None and norm.bias_seed is not None
    gain, shift = norm.weight_seed.weight[:, 0], norm.bias_seed.weight[:, 0]
    centred = x - x.mean(-1, keepdim=True)
    sigma = x.var(-1, keepdim=True, unbiased=False).sqrt()
    assert close(norm(x), gain * centred / (sigma + 0.1) + shift)
    rms = rbe.nn.RMSNorm(6, 0.1, parameters="seed", **options)  # type: ignore[arg-type]
    assert rms.weight_seed is not None
    assert close(rms(x), rms.weight_seed.weight[:, 0] * x / (x.square().mean(-1, keepdim=True).sqrt() + 0.1))


@pytest.mark.parametrize("options", [{"format": "packed64", "mode": "faithful"}, OPEN["faithful"]])
def test_a_fresh_printed_gain_is_about_one(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    for seed in range(12):
        norm = rbe.nn.LayerNorm(6, parameters="seed", **options)  # type: ignore[arg-type]
        if seed > 9 and norm.weight_seed is not None:
            norm.weight_seed.freeze()
            norm.reset_parameters()
        gain = norm.gain()
        assert gain is not None and bool((gain - 1).abs().max() < 0.2)


def test_fresh_norms_are_nearly_plain() -> None:
    torch.manual_seed(0)
    for options in OPEN.values():
        if options.get("mode") != "faithful" and options["format"] not in NO_VECTORS:
            norm = rbe.nn.LayerNorm(64, parameters="seed", **options)
            gain, shift = norm.gain(), norm.shift()
            assert gain is not None and shift is not None
            assert bool((gain - 1).abs().max() < 0.1) and bool(shift.abs().max() < 0.1)
            norm.reset_parameters()
            assert bool((norm.gain() - 1).abs().max() < 0.1)  # type: ignore[operator]


def test_bytes_of_the_paper() -> None:
    """000 section 5.8.2: two seeds a norm."""
    count = rbe.nn.count(rbe.nn.LayerNorm(768, parameters="seed"))
    assert (count.seed_bytes, count.whole_bytes, count.vector_weights) == (16, 24, 2 * 768)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("frozen", [False, True])
def test_folding_gives_one_layer_that_does_both(kind: str, frozen: bool) -> None:
    torch.manual_seed(0)
    options = {"format": "packed128", "block": 4}
    layer: rbe.nn.Linear | rbe.nn.Conv1d | rbe.nn.Conv2d
    norm: rbe.nn.BatchNorm1d | rbe.nn.BatchNorm2d = rbe.nn.BatchNorm1d(5)
    x: Tensor
    if kind == "linear":
        layer, x = rbe.nn.Linear(6, 5, "seed", **options), torch.randn(9, 6)  # type: ignore[arg-type]
    elif kind == "conv1d":
        layer, x = rbe.nn.Conv1d(6, 5, 3, bias=False, **options), torch.randn(9, 6, 7)  # type: ignore[arg-type]
    else:
        layer, norm = rbe.nn.Conv2d(6, 5, 3, **options), rbe.nn.BatchNorm2d(5)  # type: ignore[arg-type]
        x = torch.randn(9, 6, 4, 4)
    grown(norm)
    norm(3 * layer(x))
    norm.eval()
    if frozen:
        layer.freeze()
    before = layer(x)
    folded = rbe.nn.fold(layer, norm)
    assert close(folded(x), norm(before), 2e-3)
    assert torch.equal(layer(x), before)
    assert close(rbe.nn.fold(folded, norm)(x), norm(norm(before)), 4e-3)  # the factors of rows multiply
    torchs = given(type(norm).__mro__ and (nn.BatchNorm2d if kind == "conv2d" else nn.BatchNorm1d)(5), norm)
    torchs.load_state_dict(norm.state_dict())
    assert close(rbe.nn.fold(layer, torchs)(x), folded(x))  # type: ignore[type-var]


def test_factors_are_rounded_as_float16_says() -> None:
    """To 2^-11 of themselves, or to half of float16's least step, where they are tiny beside the largest."""
    layer, norm = rbe.nn.Linear(6, 60, format="packed128", block=4), rbe.nn.BatchNorm1d(60).eval()
    factors = 1.3 * 2.0 ** -torch.arange(60.0).div(2)
    with torch.no_grad():
        norm.weight.copy_(factors)
    assert norm.running_var is not None
    factors = (norm.weight * (norm.running_var + norm.eps).rsqrt()).detach()
    folded = rbe.nn.fold(layer, norm)
    assert folded.row_scale is not None
    made = folded.row_scale.double() * (folded.scale / layer.scale).detach().double()
    bound = torch.maximum(2.0**-11 * factors, 2.0**-25 * factors.max()) * (1 + 1e-5)
    assert bool(((made - factors).abs() <= bound).all())


def test_outliers_are_folded_too() -> None:
    torch.manual_seed(0)
    matrix = rbe.nn.Linear(6, 5, format="packed128", block=4).freeze().matrix
    outliers = Outliers((5, 6), torch.tensor([3, 17, 29], dtype=torch.int32), torch.tensor([5.0, -7.0, 9.0]).half())
    layer = rbe.nn.Linear.from_matrix(dataclasses.replace(matrix, outliers=outliers))
    norm = grown(rbe.nn.BatchNorm1d(5))
    x = torch.randn(9, 6)
    norm(2 * layer(x))
    norm.eval()
    assert close(rbe.nn.fold(layer, norm)(x), norm(layer(x)), 2e-3)  # type: ignore[type-var]
    assert rbe.nn.count(layer).whole_bytes == matrix.nbytes + 3 * 6


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(RbeError, match="choose one of dense, seed"):
        rbe.nn.LayerNorm(8, parameters="seeds")
    with pytest.raises(RbeError, match="formt is no option"):
        rbe.nn.LayerNorm(8, formt="packed64")  # type: ignore[call-arg]
    with pytest.raises(RbeError, match="trellis"):
        rbe.nn.RMSNorm(8, parameters="seed", format="trellis")
    with pytest.raises(RbeError, match="outer128 make blocks of a matrix, no vectors"):
        rbe.nn.RMSNorm(8, parameters="seed", format="outer128")
    with pytest.raises(RbeError, match=r"last sides must be \(8,\)"):
        rbe.nn.LayerNorm(8)(torch.randn(8, 9))
    with pytest.raises(RbeError, match="4 channels"):
        rbe.nn.BatchNorm1d(4)(torch.randn(3, 5))
    with pytest.raises(RbeError, match="4-D"):
        rbe.nn.BatchNorm2d(4)(torch.randn(3, 4))
    with pytest.raises(RbeError, match="empty"):
        rbe.nn.LayerNorm(())
    with pytest.raises(RbeError, match="7 outputs"):
        rbe.nn.fold(rbe.nn.Linear(4, 7), rbe.nn.BatchNorm1d(4))
    with pytest.raises(RbeError, match="rotated"):
        rbe.nn.fold(rbe.nn.Linear(4, 7, rotation=(1, 2)), rbe.nn.BatchNorm1d(7))
    with pytest.raises(RbeError, match="no running statistics"):
        rbe.nn.fold(rbe.nn.Linear(4, 7), rbe.nn.BatchNorm1d(7, track_running_stats=False))


@pytest.mark.parametrize("parameters", ["dense", "seed"])
@pytest.mark.parametrize("format", [{}, {"format": "packed128"}])
def test_options_that_fit_no_matrix_are_refused(parameters: str, format: dict[str, str]) -> None:
    for wrong in ({"block": 0}, {"block": "x"}, {"bits": "x"}, {"rotation": (1,)}, {"stages": 0}):
        with pytest.raises(RbeError, match=next(iter(wrong))):
            rbe.nn.LayerNorm(8, parameters=parameters, **format, **wrong)  # type: ignore[arg-type]
    with pytest.raises(RbeError, match="packed128: 3 bits"):
        rbe.nn.LayerNorm(8, parameters=parameters, format="packed128", bits=3.0)


@pytest.mark.parametrize("make", [rbe.nn.GRU, rbe.nn.MultiheadAttention, rbe.nn.FeedForward, rbe.nn.SeededEncoding])
def test_a_layer_of_several_matrices_names_an_unknown_option(make: Any) -> None:
    with pytest.raises(RbeError, match="formt is no option"):
        make(16, 2, formt="packed128")
