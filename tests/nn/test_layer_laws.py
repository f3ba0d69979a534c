"""What every seed layer does, of every kind and in every format: trains, is saved, copied, cast and compiled."""

import copy
import io
import pickle

import pytest
import torch
from elsewhere import NAME, elsewhere
from layer_cases import CASES, EVERY, PAIRS, close, first, make
from torch import nn

from rbe.errors import RbeError
from rbe.nn import Seeded


def freeze(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Seeded):
            module.freeze()
    return model


@pytest.mark.parametrize(("name", "format"), PAIRS)
def test_two_steps_of_adam_reduce_the_loss(name: str, format: str) -> None:
    layer, x = make(name, format)
    with torch.no_grad():
        target = first(layer(x)) + 0.1 * torch.randn_like(first(layer(x)))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (first(layer(x)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(("name", "format"), PAIRS)
def test_states_travel_between_open_and_frozen_layers(name: str, format: str) -> None:
    layer, x = make(name, format)
    y = first(layer(x)).detach()
    frozen = freeze(copy.deepcopy(layer))
    packed = first(frozen(x)).detach()
    assert close(packed, y, 1e-5)
    assert any(key.endswith("seeds") for key in frozen.state_dict())
    stream = io.BytesIO()
    torch.save(frozen.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream)
    opened, _ = make(name, format, seed=1)
    opened.load_state_dict(state)
    assert close(first(opened(x)), packed, 1e-5)
    again = freeze(make(name, format, seed=2)[0])
    again.load_state_dict(layer.state_dict())
    assert torch.equal(first(again(x)), packed)


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("name", CASES)
def test_copies_pickles_and_casts_compute_the_same(name: str, format: str) -> None:
    layer, x = make(name, format)
    freeze(layer).eval()
    with torch.inference_mode():
        y = first(layer(x))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(first(twin(x)), y)
        seeds = {n: b.clone() for n, b in layer.named_buffers() if n.endswith(("seeds", "scale"))}
        layer.to(torch.bfloat16)
        for n, b in layer.named_buffers():
            assert n not in seeds or torch.equal(b, seeds[n])
        rough = first(layer(x.to(torch.bfloat16) if x.is_floating_point() else x))
        assert rough.dtype == torch.bfloat16
        assert close(rough.float(), y, 0.1)


def gradients(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """Of a sum that no symmetry makes 0, by everything that is trained."""
    weights = torch.linspace(-1, 1, y.numel()).square().view_as(y).to(y.device)
    trained = [p for p in layer.parameters() if p.requires_grad]
    found = torch.autograd.grad((y * weights).sum(), trained, allow_unused=True)
    return torch.cat([g.flatten().float() for g in found if g is not None]).cpu()


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("name", CASES)
def test_layers_compute_the_same_on_another_device(name: str, format: str) -> None:
    layer, x = make(name, format)
    trains = any(p.requires_grad for p in layer.parameters())
    y = first(layer(x))
    with elsewhere():
        there = copy.deepcopy(layer).to(NAME)
        made = first(there(x.to(NAME)))
        assert made.device.type == NAME
        assert close(made.cpu(), y, 1e-4)
        assert not trains or close(gradients(there, made), gradients(layer, y), 1e-4)
        packed = first(freeze(copy.deepcopy(layer))(x))
        assert close(first(freeze(there)(x.to(NAME))).cpu(), packed, 1e-4)
        assert close(first(there.cpu()(x)), packed)


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_and_its_input_on_two_devices_are_refused(name: str, format: str, frozen: bool) -> None:
    layer, x = make(name, format)
    layer = freeze(layer) if frozen else layer
    with elsewhere():
        # By us or by torch; a kernel that takes an address of another device takes the process with it.
        with pytest.raises((RbeError, RuntimeError), match="device"):
            layer(x.to(NAME))
        with pytest.raises((RbeError, RuntimeError), match="device"):
            layer.to(NAME)(x)


@pytest.mark.parametrize("name", CASES)
def test_open_points_stay_exact_through_bfloat16(name: str) -> None:
    layer, _ = make(name, "radial")
    before = {n: p.clone() for n, p in layer.named_parameters() if n.endswith(("radius", "angle", "scale"))}
    assert before
    layer.to(torch.bfloat16)
    for n, p in layer.named_parameters():
        assert n not in before or torch.equal(p, before[n])


@pytest.mark.parametrize(("name", "format"), [("feedforward", "radial"), ("conv2d", "packed64")])
def test_compiled_layers_compute_the_same(name: str, format: str) -> None:
    layer, x = make(name, format)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert close(first(compiled(x)), first(layer(x)), 1e-5)
