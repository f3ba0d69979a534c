"""Convolutions: torch's given the decoded kernel, with every setting, and nothing dense kept."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from layer_cases import EVERY, NO_VECTORS, OPEN, close
from torch import Tensor, nn

import rbe.nn
from rbe.errors import RbeError

Ours = rbe.nn.Conv1d | rbe.nn.Conv2d

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 2, "dilation": 2, "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 6},
    "same": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    "cell": {"kernel_size": 1},
    "cell-stride": {"kernel_size": 1, "stride": 2},
    "cell-padding": {"kernel_size": 1, "padding": 1},
}


def torchs(layer: Ours) -> nn.Module:
    """Torch's layer with our decoded kernel."""
    kind = nn.Conv1d if isinstance(layer, rbe.nn.Conv1d) else nn.Conv2d
    twin = kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, padding_mode=layer.padding_mode,
    )  # fmt: skip
    bias = layer.bias if layer.bias_seed is None else layer.bias_seed()
    twin.load_state_dict({"weight": layer.weight, "bias": bias})
    return twin


def check(layer: Ours, x: Tensor) -> None:
    twin = torchs(layer)
    x.requires_grad_()
    y, expected = layer(x), twin(x)
    g = torch.randn_like(expected)
    assert close(y, expected)
    assert close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0], 1e-4)


# Torch says that padding 'same' with an even kernel copies its input.
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("sides", [1, 2])
def test_every_setting_is_torchs(setting: str, sides: int) -> None:
    torch.manual_seed(0)
    kind = rbe.nn.Conv1d if sides == 1 else rbe.nn.Conv2d
    layer = kind(6, 12, **SETTINGS[setting], **OPEN["radial"])
    check(layer, torch.randn(2, 6, *((9, 8)[:sides])))
    check(layer, torch.randn(6, *((9, 8)[:sides])))
    layer.freeze()
    check(layer, torch.randn(2, 6, *((9, 8)[:sides])))


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("kernel", [(3, 2), 1])
def test_every_format(format: str, kernel: Any) -> None:
    torch.manual_seed(0)
    bias = True if format in NO_VECTORS else "seed"
    layer = rbe.nn.Conv2d(6, 5, kernel, (2, 1), (1, 0) if kernel != 1 else 0, bias=bias, **EVERY[format])
    assert layer.spec.shape == (5, 36 if kernel != 1 else 6)
    check(layer, torch.randn(2, 6, 5, 6))


@pytest.mark.parametrize(
    "settings", [{"kernel_size": (4, 1), "padding": "same"}, {"kernel_size": 3, "padding": (3, 1)}]
)
def test_sides_are_padded_apart(settings: dict[str, Any]) -> None:
    layer = rbe.nn.Conv2d(6, 5, padding_mode="reflect", **settings, **OPEN["radial"])
    check(layer, torch.randn(2, 6, 7, 5))


def test_fresh_kernels_have_torchs_size() -> None:
    torch.manual_seed(0)
    ours, theirs = rbe.nn.Conv2d(32, 64, 3, format="packed128"), nn.Conv2d(32, 64, 3)
    assert float(ours.weight.std()) == pytest.approx(theirs.weight.std().item(), rel=0.2)


def test_no_kernel_is_left_after_a_call() -> None:
    for options in EVERY.values():
        layer = rbe.nn.Conv2d(37, 41, 3, **options)
        layer.freeze() if options["format"] != "trellis" else None
        with torch.no_grad():
            layer(torch.randn(1, 37, 4, 4))
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is Tensor and t.numel() == 37 * 41 * 9]


def test_no_kernel_waits_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = []
    dense = nn.functional.conv2d

    def watched(x: Tensor, kernel: Tensor, *settings: Any) -> Tensor:
        kernels.append(weakref.ref(kernel))
        return dense(x, kernel, *settings)

    monkeypatch.setattr(nn.functional, "conv2d", watched)
    layer = rbe.nn.Conv2d(3, 5, 3, **OPEN["radial"])
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    y = layer(x)
    assert kernels[0]() is None
    expected = torch.autograd.grad(dense(x, layer.weight), x, torch.ones_like(y))
    with torch.no_grad():  # the graph has the tensors of its call, not those of today
        layer.angle = nn.Parameter(layer.angle + 1)
    assert close(torch.autograd.grad(y, x, torch.ones_like(y))[0], expected[0])


def test_hooks_of_others_see_what_is_saved() -> None:
    layer = rbe.nn.Conv2d(3, 5, 3, **OPEN["radial"])
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert close(torch.autograd.grad(again.sum(), x)[0], torch.autograd.grad(layer(x).sum(), x)[0])


def test_layers_around_matrices_and_unfilled_ones() -> None:
    made = rbe.nn.Conv2d(6, 4, 3, 2, 1, groups=2, format="packed128", block=4).freeze()
    bias = nn.Parameter(torch.randn(4))
    layer = rbe.nn.Conv2d.from_matrix(made.matrix, bias, 6, 3, 2, 1, groups=2)
    assert layer.bias is bias and layer.seeds is made.seeds
    check(layer, torch.randn(2, 6, 5, 5))
    empty = rbe.nn.Conv2d.from_spec(made.spec, 6, 3, 2, 1, groups=2, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(empty(x), layer(x)) and empty.weight.shape == (4, 3, 3, 3)


def test_wrong_settings_are_refused() -> None:
    for settings, message in [
        ({"groups": 4}, "groups 4 must divide both 6 input and 8 output"),
        ({"stride": 0}, "stride 0"),
        ({"dilation": (1, 2, 3)}, "dilation"),
        ({"padding": -1}, "padding -1"),
        ({"padding": "full"}, "'full'"),
        ({"padding": "same", "stride": 2}, "'same' has no meaning"),
        ({"padding_mode": "mirror"}, "'mirror' is not offered"),
        ({"bias": "dense"}, "choose True"),
        ({"bias": "seed"}, "trellis"),
    ]:
        with pytest.raises(RbeError, match=message):
            rbe.nn.Conv2d(6, 8, 3, **settings)  # type: ignore[arg-type]
    with pytest.raises(RbeError, match="kernel_size"):
        rbe.nn.Conv1d(6, 8, (3, 3))
    layer = rbe.nn.Conv2d(6, 8, 3, format="packed128")
    for sides in [(6, 5), (2, 5, 4, 4), (1, 1, 6, 4, 4)]:
        with pytest.raises(RbeError, match="after 6 channels"):
            layer(torch.randn(sides))
    matrix = layer.freeze().matrix
    with pytest.raises(RbeError, match=r"take \(8, 24\)"):
        rbe.nn.Conv2d.from_matrix(matrix, None, 6, 2)
    with pytest.raises(RbeError, match="8 rows"):
        rbe.nn.Conv2d.from_matrix(matrix, torch.zeros(6), 6, 3)


@pytest.mark.parametrize("size", [1, 3])
def test_integers_are_refused(size: int) -> None:
    for layer, shape in ((rbe.nn.Conv1d(4, 6, size), (2, 4, 7)), (rbe.nn.Conv2d(4, 6, size), (2, 4, 7, 7))):
        with pytest.raises(RbeError, match=r"x is torch\.int64"):
            layer(torch.ones(shape, dtype=torch.int64))
