"""`rbe.nn.Linear` in the packed formats: open and frozen, its seeded bias, and the bytes of the papers."""

import pytest
import torch
from layer_cases import EVERY, NO_VECTORS, OPEN, close
from torch import Tensor, nn

import rbe.nn
from rbe.errors import RbeError
from rbe.matrix import SeedMatrix


@pytest.mark.parametrize(
    ("format", "bias"), [(f, b) for f in OPEN for b in (True, "seed", False) if b != "seed" or f not in NO_VECTORS]
)
def test_open_and_frozen_equal_the_dense_layer(format: str, bias: bool | str) -> None:
    torch.manual_seed(0)
    layer = rbe.nn.Linear(9, 7, bias, **OPEN[format])
    offset = layer.bias_seed() if bias == "seed" else layer.bias
    x = torch.randn(2, 3, 9)
    expected = nn.functional.linear(x, layer.weight, offset)
    assert layer.trainable and close(layer(x), expected)
    assert not layer.freeze().trainable
    with torch.inference_mode():
        assert close(layer(x), expected)


def test_the_gradient_to_the_input_is_the_dense_one() -> None:
    for options in EVERY.values():
        layer = rbe.nn.Linear(9, 7, **options)
        x = torch.randn(3, 9, requires_grad=True)
        g = torch.randn(3, 7)
        layer(x).backward(g)
        assert x.grad is not None and close(x.grad, g @ layer.weight)


def test_gradients_to_the_seeds_are_the_contracted_dense_ones() -> None:
    layer = rbe.nn.Linear(9, 7, format="packed128", block=4)
    x, g = torch.randn(3, 9), torch.randn(3, 7)
    layer(x).backward(g)
    by_product = [p.grad.clone() for p in (layer.radius, layer.angle, layer.scale) if p.grad is not None]
    layer.zero_grad()
    layer.dense().backward(g.T @ x)
    for one, other in zip(by_product, (layer.radius, layer.angle, layer.scale), strict=True):
        assert other.grad is not None and close(one, other.grad, 1e-4)


def test_bytes_of_the_paper() -> None:
    """000 section 5.2.2: 16 bytes, d_out (d_in + 1) / 4 to 1, the scales not counted."""
    layer = rbe.nn.Linear(64, 32, bias="seed", format="packed64", block=None)
    count = rbe.nn.count(layer)
    assert count.seed_bytes == 16 and count.whole_bytes == 24
    assert 4 * count.weights / count.seed_bytes == 32 * (64 + 1) / 4
    assert count == rbe.nn.count(layer.freeze())
    stored = [layer.matrix, layer.bias_seed.freeze().matrix if layer.bias_seed is not None else layer.matrix]
    assert sum(matrix.nbytes for matrix in stored) == count.whole_bytes


def test_a_step_out_of_the_disk_is_refused() -> None:
    layer = rbe.nn.Linear(9, 7, format="packed128", block=4)
    with torch.no_grad():
        layer.radius[2, 0] = 1.0
    with pytest.raises(RbeError, match=r"radius of a layer is 1 at \[2, 0\]"):
        layer(torch.randn(9))
    with torch.no_grad():
        layer.radius[2, 0] = float("nan")
    with pytest.raises(RbeError, match="radius"):
        layer.freeze()


def test_fresh_biases_have_the_size_of_torchs_again_and_again() -> None:
    torch.manual_seed(0)
    layer = rbe.nn.Linear(100, 4000, "seed", format="packed64", block=16)
    assert layer.bias_seed is not None
    for _ in range(2):
        assert float(layer.bias_seed().detach().square().mean().sqrt()) == pytest.approx((3 * 100) ** -0.5, rel=0.1)
        layer.bias_seed.reset_parameters()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "seed"}, "trellis"),
        ({"bias": "seed", "format": "outer128"}, "no vectors"),
        ({"bias": "dense"}, "choose True"),
        ({"format": "packed64", "bits": 2.0}, "bits"),
        ({"format": "packed32"}, "packed128, packed64, trellis"),
        ({"format": "packed128", "mode": "round"}, "round"),
        ({"format": "packed128", "block": 0}, "block 0"),
    ],
)
def test_wrong_choices_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RbeError, match=message):
        rbe.nn.Linear(9, 7, **options)  # type: ignore[arg-type]


def test_the_input_must_fit() -> None:
    with pytest.raises(RbeError, match=r"\(2, 8\)"):
        rbe.nn.Linear(9, 7, format="packed128")(torch.randn(2, 8))


def test_vmap_over_a_frozen_layer() -> None:
    layer = rbe.nn.Linear(9, 7, format="packed128", block=4).freeze()
    x: Tensor = torch.randn(4, 2, 9)
    assert close(torch.func.vmap(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns about itself
def test_layers_that_differ_in_everything_are_compiled_one_by_one() -> None:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    for (rows, columns), block in {(24, 40): 16, (56, 80): 16, (24, 64): 8, (9, 31): 5}.items():
        layer, x = rbe.nn.Linear(columns, rows, format="packed64", block=block), torch.randn(4, columns)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert close(compiled(x), layer(x))


@pytest.mark.parametrize(("format", "block"), [(f, b) for f in EVERY for b in (8, None) if b or f != "outer128"])
def test_autocast_rounds_no_seeds(format: str, block: int | None) -> None:
    options = EVERY[format] if format == "trellis" else {**EVERY[format], "block": block}
    layer, x = rbe.nn.Linear(30, 20, **options), torch.randn(12, 30)
    expected = []
    for on in (False, True):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            y, w = layer(inputs), layer.dense()
            found = torch.autograd.grad(y.square().sum() + w.square().sum(), [inputs, *layer.parameters()])
        expected.append((y, w, *found))
    assert all(close(a, b) for a, b in zip(*expected, strict=True))


@pytest.mark.parametrize("format", ["packed128", "outer128"])
def test_a_frozen_layer_refuses_seeds_that_stand_for_no_weights(format: str) -> None:
    layer = rbe.nn.Linear(16, 16, format=format).freeze()
    kept = layer(torch.ones(16))
    bad = {**layer.state_dict(), "seeds": torch.full_like(layer.seeds, -1)}
    with pytest.raises(RuntimeError, match=f"{format}: radius is nan"):
        layer.load_state_dict(bad)
    assert torch.equal(layer(torch.ones(16)), kept)
    layer.seeds = bad["seeds"]
    with pytest.raises(RbeError, match=f"{format}: radius is nan"):
        layer(torch.ones(16))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_not_loaded(value: float, frozen: bool) -> None:
    layer = rbe.nn.Linear(16, 16, format="packed64")
    layer = layer.freeze() if frozen else layer
    with pytest.raises(RuntimeError, match="scale is NaN or infinite"):
        layer.load_state_dict({**layer.state_dict(), "scale": torch.tensor(value)})
    assert bool(layer.scale.isfinite())


@pytest.mark.parametrize("precision", [32, 64])
def test_seeds_at_the_rim_can_be_unfrozen(precision: int) -> None:
    matrix = SeedMatrix.from_seeds(
        torch.full((1, precision // 32), -(1 << 32) + (1 << 30)), (16, 16), "packed64", precision=precision
    )
    layer, x = rbe.nn.Linear.from_matrix(matrix), torch.ones(1, 16)
    y, state = layer(x), layer.state_dict()
    assert torch.allclose(layer.unfreeze()(x), y, atol=1e-5)
    other = rbe.nn.Linear(16, 16, bias=False, format="packed64", precision=precision)
    other.load_state_dict(state)
    assert torch.allclose(other(x), y, atol=1e-5)
