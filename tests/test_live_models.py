"""Live torch models in every format: convolutions, recurrent layers, open seeds, seeded biases and norms."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rbe
from rbe import RbeError, convert
from rbe.compress import plan_model
from rbe.nn import swap

FORMS: dict[str, dict[str, Any]] = {
    "trellis": {"bits": 4},
    "radial": {"format": "packed128", "block": 8, "stages": 2},
    "faithful": {"format": "packed128", "mode": "faithful"},
    "packed64": {"format": "packed64", "block": 4},
    "outliers": {"format": "packed128", "outliers": 0.02},
}


class Net(nn.Module):
    """One of every layer that can hold seeds, and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 32)
        self.conv = nn.Sequential(
            nn.Conv1d(32, 48, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv1d(48, 48, 3, padding="same", groups=2, bias=False),
        )
        self.lstm = nn.LSTM(48, 32, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(64, 32, bias=False, batch_first=True)
        self.image = nn.Conv2d(1, 64, (3, 5), stride=2, padding=(1, 2))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 40)

    def forward(self, index: Tensor) -> Tensor:
        x = self.conv(self.table(index).transpose(1, 2)).transpose(1, 2)
        x, _ = self.gru(self.lstm(x)[0])
        image: Tensor = self.image(x[:, None])
        out: Tensor = self.head(self.norm(x)) + image.mean()
        return out


INDEX = torch.arange(18).reshape(2, 9)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module", params=list(FORMS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """(a compressed model, the folder it was saved to)."""
    model = net()
    plan = rbe.compress_(model, effort="fast", **FORMS[request.param])
    kinds = [entry.kind for entry in plan.seeded]
    assert (kinds.count("recurrent"), kinds.count("conv"), kinds.count("linear"), kinds.count("embedding")) == (
        10, 3, 1, 1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("net") / "seeds"
    rbe.save(model, folder)
    return model, folder


def test_every_layer_computes_what_its_decoded_weights_do(case: tuple[nn.Module, Path]) -> None:
    model, _ = case
    assert type(model.lstm) is rbe.nn.LSTM and type(model.gru) is rbe.nn.GRU
    assert type(model.conv[0]) is rbe.nn.Conv1d and type(model.image) is rbe.nn.Conv2d
    dense = rbe.decompress_(copy.deepcopy(model))
    assert type(dense.lstm) is nn.LSTM and type(dense.image) is nn.Conv2d
    assert {n: t.shape for n, t in dense.state_dict().items()} == {n: t.shape for n, t in Net().state_dict().items()}
    with torch.no_grad():
        assert torch.allclose(dense(INDEX), model(INDEX), atol=1e-4)


def test_saved_seeds_load_into_dense_seeded_and_empty_models(case: tuple[nn.Module, Path]) -> None:
    model, folder = case
    with torch.device("meta"):
        empty = Net()
    for given in (Net(), empty, copy.deepcopy(model)):
        assert torch.equal(rbe.load(folder, model=given)(INDEX), model(INDEX))


@pytest.mark.parametrize("case", [form for form in FORMS if form != "trellis"], indirect=True)
def test_open_seeds_are_packed_when_they_are_saved(case: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = case
    opened = copy.deepcopy(model)
    for module in opened.modules():
        if isinstance(module, rbe.nn.Seeded):
            module.unfreeze()
    opened(INDEX).sum().backward()
    with torch.no_grad():
        for name, parameter in opened.named_parameters():
            if name.endswith("angle"):
                parameter += 0.1
    rbe.save(opened, tmp_path / "seeds")
    assert opened.head.trainable, "saving leaves the model open"
    for given in (Net(), copy.deepcopy(opened), copy.deepcopy(model)):
        again = rbe.load(tmp_path / "seeds", model=given)
        assert not again.head.trainable and torch.allclose(again(INDEX), opened(INDEX), atol=1e-5)
    with torch.no_grad():
        opened.lstm.ih_l0.radius[0, 0] = 1.5
    with pytest.raises(RbeError, match=r"lstm\.ih_l0: .*radius is 1\.5"):
        rbe.save(opened, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_the_command_line_makes_the_dense_model_again(case: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = case
    convert.decompress(folder, tmp_path / "dense")
    dense = Net().eval()
    dense.load_state_dict(load_file(next((tmp_path / "dense").glob("*.safetensors"))))
    assert torch.allclose(dense(INDEX), model(INDEX), atol=1e-4)


def test_a_bare_file_fills_the_model_it_came_from(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    # Names alone do not tell that the table is an embedding.
    convert.compress(tmp_path / "net.safetensors", tmp_path / "seeds", effort="fast", bits=4, exclude=["table"])
    model = net()
    rbe.compress_(model, effort="fast", bits=4, exclude=["table"])
    loaded = rbe.load(tmp_path / "seeds", model=Net())
    for name in ("lstm", "gru", "conv", "head"):
        ours, theirs = getattr(loaded, name).state_dict(), getattr(model, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_file_without_counters_of_batches_fills_batch_norms(tmp_path: Path) -> None:
    def picture() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()).eval()

    model = picture()
    state = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "net.safetensors")
    convert.compress(tmp_path / "net.safetensors", tmp_path / "seeds", effort="fast", bits=4)
    loaded, x = rbe.load(tmp_path / "seeds", model=picture()), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert (loaded(x) - model(x)).norm() < 0.2 * model(x).norm()


def seeded() -> nn.Module:
    return nn.Sequential(
        rbe.nn.Linear(32, 48, bias="seed", format="packed128"),
        rbe.nn.LayerNorm(48, parameters="seed"),
        rbe.nn.LSTM(48, 16, bias="seed", format="packed64", block=4),
    ).eval()


class First(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)[0]
        return out


def test_vectors_from_seeds_survive(tmp_path: Path) -> None:
    x = torch.randn(5, 32)
    model = First(*seeded())
    rbe.save(model, tmp_path / "seeds")
    assert torch.allclose(rbe.load(tmp_path / "seeds", model=First(*seeded()))(x), model(x), atol=1e-6)
    convert.decompress(tmp_path / "seeds", tmp_path / "dense")
    dense = First(nn.Linear(32, 48), nn.LayerNorm(48), nn.LSTM(48, 16)).eval()
    dense.load_state_dict(load_file(next((tmp_path / "dense").glob("*.safetensors"))))
    assert torch.allclose(dense(x), model(x), atol=1e-5)
    assert torch.allclose(rbe.decompress_(copy.deepcopy(model))(x), model(x), atol=1e-5)


def test_a_dense_layer_takes_a_bias_from_a_seed(tmp_path: Path) -> None:
    model = nn.Sequential(rbe.nn.Linear(32, 48, bias="seed", format="packed64"))
    rbe.save(model, tmp_path / "seeds")
    x = torch.randn(5, 32)
    loaded = rbe.load(tmp_path / "seeds", model=nn.Sequential(nn.Linear(32, 48)))
    assert torch.allclose(loaded(x), model(x), atol=1e-6) and loaded[0].bias is None
    with pytest.raises(RbeError, match=r"0 is \(64, 32\) in the given model"):
        rbe.load(tmp_path / "seeds", model=nn.Sequential(nn.Linear(32, 64)))
    with pytest.raises(RbeError, match="build the model with the settings it was saved with"):
        rbe.load(tmp_path / "seeds", model=nn.Sequential(rbe.nn.Linear(32, 48, bias="seed", format="packed128")))


def test_the_matrices_of_a_recurrent_layer_stay_together() -> None:
    model = nn.ModuleDict({"thin": nn.LSTM(1, 32), "projected": nn.LSTM(32, 32, proj_size=16), "out": nn.GRU(32, 32)})
    reasons = {entry.name: entry.reason for entry in plan_model(model, exclude=["out.weight_hh_l0"])[0]}
    assert "weight_ih_l0 of the same layer is kept (too thin" in reasons["thin.weight_hh_l0"]
    assert "projections" in reasons["projected.weight_ih_l0"]
    assert "the same layer is kept (excluded)" in reasons["out.weight_ih_l0"]
    assert "whole model" in {site.module: site.reason for site in swap.find(nn.GRU(32, 32))}[".ih_l0"]
    twice = nn.ModuleList([nn.GRU(32, 32)] * 2)
    assert all("shares weights" in site.reason for site in swap.find(twice))
    kernels = nn.ModuleList([nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)])
    kernels[1].weight = kernels[0].weight
    assert "several layers" in swap.find(kernels)[0].reason
