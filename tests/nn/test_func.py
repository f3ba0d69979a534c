"""Gradients of every layer in every format: against central differences, and through torch.func."""

from typing import Any

import pytest
import torch
from layer_cases import CASES, PAIRS, close, first, make
from torch import Tensor, func, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rbe.formats import make_spec
from rbe.matrix import SeedMatrix
from rbe.nn import Linear
from rbe.search import encode

# torch's own first use of forward derivatives warns about what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def call(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return first(func.functional_call(layer, parameters, (x,)))


def split(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters()}


@pytest.mark.parametrize(("name", "format"), PAIRS)
def test_gradients_equal_central_differences(name: str, format: str) -> None:
    layer, x = make(name, format)
    layer.double()
    inputs = (x.double().requires_grad_(),) if x.is_floating_point() else ()
    names = [n for n, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert any(n.endswith("radius") for n in names) and all(v.dtype == torch.float64 or v.ndim == 0 for v in values)

    def function(*tensors: Tensor) -> Tensor:
        at = tensors[0] if inputs else x
        return call(layer, dict(zip(names, tensors[len(inputs) :], strict=True)), at)

    # The 0-d scale stays float32, too coarse for differences: test_scale below has it. Latents decide signs, and their
    # gradient, straight through, is none of a difference.
    smooth = [v.dtype == torch.float64 and not n.endswith("latent") for n, v in zip(names, values, strict=True)]
    fine = [v if there else v.detach() for v, there in zip(values, smooth, strict=True)]
    assert torch.autograd.gradcheck(function, (*inputs, *fine), fast_mode=True)


@pytest.mark.parametrize(("name", "format"), PAIRS)
def test_transforms_agree_with_each_other(name: str, format: str) -> None:
    layer, x = make(name, format)
    parameters = split(layer)
    y = call(layer, parameters, x)
    g = torch.randn_like(y)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return (call(layer, p, x) * g).sum()

    by_func = func.grad(loss)(parameters)
    (first(layer(x)) * g).sum().backward()
    top = max(float(p.abs().max()) for p in by_func.values())  # some are 0 but for rounding
    for n, p in layer.named_parameters():
        assert p.grad is not None and bool((by_func[n] - p.grad).abs().max() <= 1e-4 * top), n
    directions = {n: torch.randn_like(p) for n, p in parameters.items()}
    _, along = func.jvp(lambda p: call(layer, p, x), (parameters,), (directions,))
    back = sum((by_func[n] * directions[n]).sum() for n in parameters)
    assert float((along * g).sum()) == pytest.approx(float(back), rel=1e-3, abs=1e-4 * top)


@pytest.mark.parametrize("format", ["radial", "packed64-whole", "trellis"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("embedding",)])
def test_vmap_and_jacobians_over_inputs(name: str, format: str) -> None:
    layer, x = make(name, format)
    layer.eval()

    def function(x: Tensor) -> Tensor:
        return first(layer(x))

    xs = torch.stack((x, x.flip(0) * 0.5))
    together = func.vmap(function)(xs)
    assert close(together, torch.stack([function(x) for x in xs]), 1e-4)
    jacobian: Any = func.jacrev(function)(x)
    direction = torch.randn_like(x)
    y, along = func.jvp(function, (x,), (direction,))
    assert close(jacobian.flatten(y.ndim).flatten(0, -2) @ direction.flatten(), along.flatten(), 1e-3)


@pytest.mark.parametrize("format", ["radial", "packed64"])
def test_vmap_over_models_of_an_ensemble(format: str) -> None:
    layers = [make("feedforward", format, seed)[0] for seed in (1, 2)]
    x = torch.randn(3, 6)
    parameters, buffers = func.stack_module_state(layers)
    y = func.vmap(lambda p, b: func.functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    assert close(y, torch.stack([layer(x) for layer in layers]), 1e-4)


def test_the_gradient_of_the_scale() -> None:
    layer, x = make("linear", "radial")
    layer(x).sum().backward()
    product = (layer(x) - layer.bias_seed()).sum().detach()
    assert layer.scale.grad is not None
    assert float(layer.scale.grad * layer.scale.detach()) == pytest.approx(float(product), rel=1e-4)


TRANSFORMS = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "vjp": lambda f, x: func.vjp(f, x),
    "grad": lambda f, x: func.grad(lambda v: f(v).sum())(x),
    "jacrev": lambda f, x: func.jacrev(f)(x[0]),
    "vmap": lambda f, x: func.vmap(f)(x),
    "make_fx": lambda f, x: make_fx(lambda v: f(v))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("format", ["trellis", "packed64", "packed128", "outer128"])
def test_a_first_call_under_a_transform_leaves_nothing_behind(format: str, transform: str) -> None:
    matrix = encode(torch.randn(16, 16), format=format, effort="fast")
    layer, x = Linear.from_matrix(matrix), torch.randn(3, 16)
    for call in (layer, matrix.matmul):
        TRANSFORMS[transform](call, x)
        assert torch.allclose(call(x), x @ matrix.decode().T, atol=1e-3)
        assert torch.allclose(func.vmap(call)(x), call(x), atol=1e-3)  # and after a plain call


@pytest.mark.parametrize("format", ["trellis", "packed64", "packed128", "outer128", "graded"])
def test_a_first_call_on_fake_tensors_leaves_nothing_behind(format: str) -> None:
    if format == "graded":
        spec = make_spec("trellis", (40, 20), bits=((32, 3.0), (40, 1.0)))
        matrix = SeedMatrix(spec, torch.randint(-(2**62), 2**62, (28, 2)), torch.tensor(1e-3))
    else:
        matrix = encode(torch.randn(16, 16), format=format, effort="fast")
    layer, x = Linear.from_matrix(matrix), torch.randn(3, matrix.shape[1])
    for call in (layer, matrix.matmul):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert call(mode.from_tensor(x)).shape == (3, matrix.shape[0])
        assert torch.allclose(call(x), x @ matrix.decode().T, atol=1e-3)
