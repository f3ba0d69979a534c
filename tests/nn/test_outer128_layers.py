"""Layers of outer128: their signs are trained through latents, frozen and open states say the same."""

import copy

import pytest
import torch

from rbe.formats import outer128
from rbe.nn import Embedding, Linear
from rbe.nn.latents import signs_of

BLOCKS = [8, 16, 32, 64]


@pytest.mark.parametrize("block", BLOCKS)
def test_fresh_weights_have_the_variance_of_torch(block: int) -> None:
    torch.manual_seed(0)
    layer = Linear(192, 128, format="outer128", block=block)
    assert layer.weight.square().mean().item() * 3 * 192 == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("block", BLOCKS)
def test_frozen_and_open_compute_the_same(block: int) -> None:
    torch.manual_seed(1)
    layer = Linear(50, 40, format="outer128", block=block)
    x = torch.randn(3, 50)
    y = layer(x)
    state = copy.deepcopy(layer.state_dict())
    assert "latent" in state
    layer.freeze()
    assert sorted(layer.state_dict()) == ["bias", "scale", "seeds"]
    assert torch.allclose(layer(x), y, atol=1e-5)
    layer.unfreeze()
    assert torch.allclose(layer(x), y, atol=1e-5)
    other = Linear(50, 40, format="outer128", block=block).freeze()
    other.load_state_dict(state)
    assert torch.allclose(other(x), y, atol=1e-5)
    again = Linear(50, 40, format="outer128", block=block)
    again.load_state_dict(other.state_dict())
    assert torch.allclose(again(x), y, atol=1e-5)


def test_the_gradient_of_a_latent_is_that_of_its_sign() -> None:
    torch.manual_seed(2)
    layer = Linear(16, 16, False, format="outer128")
    x, probe = torch.randn(4, 16), torch.randn(4, 16)
    (layer(x) * probe).sum().backward()
    g = probe.T @ x
    u, v = outer128.vectors(signs_of(layer.latent), layer.spec)
    a, b = outer128.coefficients(layer.radius, layer.angle, layer.spec)[0, 0] * layer.scale
    expected = torch.stack([a * g @ v[0, 0, 0], a * g.T @ u[0, 0, 0], b * g @ v[0, 0, 1], b * g.T @ u[0, 0, 1]])
    assert layer.latent.grad is not None
    assert torch.allclose(layer.latent.grad[0, 0].reshape(4, 16), expected, atol=1e-5)


def test_any_optimizer_turns_signs_and_lowers_the_loss() -> None:
    torch.manual_seed(3)
    teacher = Linear(32, 24, False, format="outer128")
    x = torch.randn(256, 32)
    wanted = teacher(x).detach()
    layer = Linear(32, 24, False, format="outer128")
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
    before = layer.matrix.seeds.clone()
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    turned = (outer128.split(before, layer.spec)[0] ^ outer128.split(layer.matrix.seeds, layer.spec)[0]) != 0
    assert turned.all()


def test_an_embedding_looks_up_rows_of_its_matrix() -> None:
    torch.manual_seed(4)
    table = Embedding(40, 24, format="outer128")
    index = torch.tensor([[0, 39], [17, 0]])
    rows = table(index)
    assert torch.allclose(rows, table.dense()[index], atol=1e-6)
    rows.sum().backward()
    touched = table.latent.grad.abs().sum((1, 2)) > 0
    assert touched.reshape(3, 2).tolist() == [[True, True]] * 3
    assert torch.allclose(table.freeze()(index), rows, atol=1e-5)


def test_torch_func_sees_through() -> None:
    torch.manual_seed(5)
    layer = Linear(20, 12, format="outer128", block=8)
    names = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(5, 20)

    def out(values: dict[str, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, values, (at,)).square().sum()

    grads = torch.func.grad(out)(names, x)
    out(dict(layer.named_parameters()), x).backward()
    for name, p in layer.named_parameters():
        assert torch.allclose(grads[name], p.grad, atol=1e-5), name
    each = torch.func.vmap(torch.func.grad(out), (None, 0))(names, x[:, None])
    assert torch.allclose(each["latent"].sum(0), grads["latent"], atol=1e-4)
