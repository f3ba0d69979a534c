"""The peers of `benchmarks.trained`: every byte counted, gradients that exist, networks that fit their bytes."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.trained import table
from benchmarks.trained.layers import (
    CHUNK,
    Basis,
    BasisLinear,
    HashedLinear,
    LowRankLinear,
    Matrix,
    NolaLinear,
    QuantLinear,
    size_of,
)
from benchmarks.trained.methods import METHODS, RATIOS, Task, whole_of
from benchmarks.trained.pruned import Pruned, SparseLinear, huffman, shared_values, sparse_bytes, spread
from benchmarks.trained.stored import Shift, store, weight_bytes, whole_bytes
from benchmarks.trained.values import Values, fitting
from rbe.nn import Seeded, Stream
from rbe.optim import StreamAdam
from rbe.train import train
from rbe.train.config import Seeds

# (layer of 48 inputs and 20 outputs, its bytes)
LAYERS: dict[str, tuple[Callable[[], Matrix], int]] = {
    "quantised": (lambda: QuantLinear(48, 20, 2), 48 * 20 // 4 + 2),
    "hashed": (lambda: HashedLinear(48, 20, 62, 4, 0), 62),
    "basis": (lambda: BasisLinear(48, 20, 62, 8, 0), 62),
    "low rank": (lambda: LowRankLinear(48, 20, 3, 4), (48 * 3 + 20 * 3) // 2 + 4),
    "nola": (lambda: NolaLinear(48, 20, 8, 68, 4, 0), 68),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_counts_every_stored_byte(name: str) -> None:
    make, nbytes = LAYERS[name]
    layer = make()
    assert layer.stored() == (48 * 20, nbytes)
    # Nothing else would have to be in a file: what the state holds besides the numbers are their steps.
    numbers = sum(t.numel() for key, t in layer.state_dict().items() if key.endswith("latent"))
    bits = next(part.bits for part in layer.modules() if isinstance(part, Values))
    steps = sum(key.endswith("step") for key in layer.state_dict())
    assert len(layer.state_dict()) == 2 * steps
    assert math.ceil(numbers * bits / 8) + 2 * steps == pytest.approx(nbytes, abs=1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_its_numbers_the_gradient_of_its_weight(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    x = torch.randn(16, 48)
    assert torch.allclose(layer(x), functional.linear(x, layer.weight()), atol=1e-5)
    (layer(x) * torch.randn(16, 20)).sum().backward()
    for key, p in layer.named_parameters():
        assert p.grad is not None, key
        # Latents beyond the grid rest; of those within none does.
        moved = float((p.grad != 0).float().mean())
        assert moved > 0.8, (key, moved)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_learns_a_teacher_of_its_kind(name: str) -> None:
    torch.manual_seed(0)
    layer, teacher = LAYERS[name][0](), LAYERS[name][0]().weight().detach()
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 48)
        loss = (layer(x) - x @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Unrelated weights begin at twice the teacher's energy.
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), (losses[0], losses[-1])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_lie_on_a_grid_of_so_many_bits(bits: int) -> None:
    torch.manual_seed(0)
    values = Values(torch.randn(1000), bits)
    assert values.step is not None
    place = values() / values.step.exp().half().float()
    assert torch.allclose(place, place.sub(0.5).round() + 0.5, atol=1e-3)
    assert len(values().unique()) <= 2**bits
    assert values.nbytes == 1000 * bits // 8 + 2
    assert fitting(values.nbytes, bits) == 1000
    inside = values.latent.detach().abs() < values.step.exp() * 2 ** (bits - 1)
    (values() * torch.arange(1000.0)).sum().backward()
    assert torch.allclose(values.latent.grad[inside], torch.arange(1000.0)[inside])  # type: ignore[index]


def test_sixteen_bits_are_float16() -> None:
    values = Values(torch.randn(10), 16)
    assert torch.equal(values(), values.latent.half().float())
    assert values.nbytes == 20


@pytest.mark.parametrize(("n", "count"), [(CHUNK, 50), (3 * CHUNK - 7, 200)])
def test_a_basis_has_columns_of_one_length_at_right_angles(n: int, count: int) -> None:
    basis = Basis(3 * CHUNK if n > CHUNK else n, count, 5)
    columns = torch.stack([basis(column) for column in torch.eye(count)])
    gram = columns @ columns.T
    assert torch.allclose(gram, torch.eye(count) * gram[0, 0], atol=1e-2 * float(gram[0, 0]))
    assert float(Basis(n, count, 5)(torch.randn(count)).std()) == pytest.approx(1, abs=0.3)


def test_fresh_weights_have_the_size_of_torchs() -> None:
    torch.manual_seed(0)
    for layer in (
        HashedLinear(300, 200, 4000, 4, 0),
        BasisLinear(300, 200, 4000, 4, 0),
        LowRankLinear(300, 200, 32, 4),
        NolaLinear(300, 200, 32, 4000, 4, 0),
    ):
        assert float(layer.weight().detach().std()) == pytest.approx(size_of(300), rel=0.1)


def test_a_hash_uses_every_entry_of_its_table_and_both_signs() -> None:
    layer = HashedLinear(128, 64, 1002, 8, 3)
    counts = torch.bincount(layer.index, minlength=1000)
    # Eight weights an entry on average; a Poisson number of 8 is 0 once in 3,000.
    assert int((counts == 0).sum()) < 5
    entries = layer.values().detach()[layer.index]
    signs = (layer.weight().detach().reshape(-1) / entries).sign()
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.05


def test_huffman_meets_kraft_and_stays_within_a_bit_of_the_entropy() -> None:
    counts = torch.tensor([1000, 300, 300, 77, 20, 5, 1, 0])
    lengths = huffman(counts)
    used = counts > 0
    assert float((2.0 ** -lengths[used]).sum()) == 1
    share = counts[used] / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    assert entropy <= float((share * lengths[used]).sum()) < entropy + 1
    assert huffman(torch.tensor([0, 9])).tolist() == [0, 1]


def test_bytes_of_a_sparse_matrix() -> None:
    # Every eighth weight is kept: one distance only, one bit each; two codes in turn, one bit each.
    kept = torch.zeros(800, dtype=torch.bool)
    kept[7::8] = True
    code = torch.zeros(800, dtype=torch.int64)
    code[15::16] = 1
    # The narrowest field that holds 7 has 4 bits: a table of 16 entries of 4 bits, one of 2 for the codes.
    assert sparse_bytes(kept, code, 2) == math.ceil((100 + 16 * 4 + 100 + 2 * 4) / 8) + 2 * 2 + 4


def test_shared_values_are_a_fixed_point_of_k_means() -> None:
    x = torch.cat([torch.randn(500) * 0.1 - 1, torch.randn(500) * 0.1 + 2])
    centres, code = shared_values(x, 2)
    assert torch.allclose(centres, torch.stack([x[code == 0].mean(), x[code == 1].mean()]))
    assert (code == (x > 0.5)).all()


def _pruned(nbytes: int, steps: int) -> Pruned:
    first, last = SparseLinear(64, 32, 4), SparseLinear(32, 4, 4)
    return Pruned(nn.Flatten(), first, nn.BatchNorm1d(32), nn.ReLU(), last, Shift(4), nbytes=nbytes, steps=steps)


def test_pruning_ends_at_the_bytes_asked_for_and_is_silent_before() -> None:
    torch.manual_seed(0)
    model = _pruned(330, 120)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = torch.randn(50, 64), torch.randint(0, 4, (50,))
    silent = []
    for _ in range(120):
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        silent.append(bool((model.eval()(x) == 0).all()))
    assert silent.index(False) == 72 and not any(silent[72:])
    nbytes = sum(matrix.stored()[1] for matrix in model.matrices)
    assert 315 <= nbytes <= 330
    for matrix in model.matrices:
        weight: Tensor = matrix.weight()
        assert len(weight[weight != 0].unique()) <= 4
        assert matrix.centres.grad is not None and (matrix.centres.grad != 0).any()
    before = model.eval()(x)
    other = _pruned(330, 120)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), before)


def test_a_weight_that_was_dropped_stays_away() -> None:
    matrix = SparseLinear(20, 10, 4)
    matrix.keep(30)
    before = matrix.kept.clone()
    assert int(matrix.trial(100)[0].sum()) == 30
    matrix.keep(100)
    assert torch.equal(matrix.kept, before)


def test_kept_weights_are_spread_by_the_sides_of_matrices() -> None:
    layers = [SparseLinear(784, 256, 2), SparseLinear(256, 128, 2), SparseLinear(128, 10, 2)]
    assert spread(1.0, layers) == [784 * 256, 256 * 128, 1280]
    counts = spread(0.01, layers)
    assert sum(counts) == pytest.approx(2347, abs=3)
    assert counts[0] / counts[1] == pytest.approx((784 + 256) / (256 + 128), rel=0.01)
    assert spread(0.1, layers)[2] == 1280


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_fits_its_bytes_and_stores_what_it_computes(name: str, ratio: int) -> None:
    torch.manual_seed(0)
    method, whole = METHODS[name], whole_of(ratio)
    settings = {key: values[0] for key, values in method.grid.items() if key != "lr"}
    model = method.build(Task(whole, ratio, 20), **settings)
    x = torch.randn(8, 1, 28, 28)
    if isinstance(model, Pruned):
        for _ in range(20):
            model(x)
    else:
        model(x).sum().backward()
    if name == "stream":
        StreamAdam(model, method.seeds(Task(whole, ratio, 20)).bytes, steps=1).fit()
    for module in model.modules():
        if isinstance(module, Seeded | Stream):
            module.freeze()
    before = model.eval()(x)
    store(model)
    assert (model(x) - before).abs().max() < 0.02 * before.abs().max()
    nbytes = whole_bytes(model)
    rest = 4 * sum(m.factor.numel() for m in model if hasattr(m, "factor")) + 2 * 10 * (name != "stream")
    assert nbytes == weight_bytes(model) + rest
    assert nbytes <= whole
    # One seed for 16x16 weights is half of what there is.
    assert nbytes > 0.5 * whole if name == "packed64" else nbytes > 0.8 * whole


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> table.Plan:
    """A small problem in MNIST's place: ten classes of bright rows; the test labels are all wrong by one."""
    rng = np.random.default_rng(0)

    def images(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, 10, n)
        x = rng.integers(0, 120, (n, 28, 28))
        for k in range(n):
            x[k, 2 * y[k] + 4 : 2 * y[k] + 6] += 120
        return x.astype(np.uint8), y.astype(np.uint8)

    (x, y), (z, w) = images(700), images(100)
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=z, y_test=(w + 1) % 10)
    monkeypatch.setattr(table, "FILES", {"mnist": str(tmp_path / "small.npz")})
    monkeypatch.setattr(table, "HELD", 100)
    monkeypatch.setattr(table, "BATCH", 50)
    monkeypatch.setattr(table, "RECIPES", tmp_path / "none.json")
    return table.Plan("mnist", 64, whole_of(64), epochs=4, tune_epochs=1, folder=tmp_path / "runs")


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "narrow" in method.grid])
def test_narrower_hosts_fit_too(name: str, ratio: int) -> None:
    method, whole = METHODS[name], whole_of(ratio)
    settings = {key: values[0] for key, values in method.grid.items() if key != "lr"}
    for narrow in method.grid["narrow"][1:]:
        model = method.build(Task(whole, ratio, 20), **{**settings, "narrow": narrow})
        norms = [m.num_features for m in model if isinstance(m, nn.BatchNorm1d)]
        assert norms == [256 // narrow, 128 // narrow]
        assert model(torch.randn(8, 1, 28, 28)).shape == (8, 10)


@pytest.mark.parametrize("name", ["dense 2-bit 14x14", "outer128", "stream"])
def test_a_row_is_tuned_without_the_test_split_and_kept(plan: table.Plan, name: str) -> None:
    said: list[str] = []
    row = table.row(plan, name, said.append)
    assert row is not None and row.settings["lr"] in METHODS[name].grid["lr"]
    assert row.validation > 0.8
    assert row.test < 0.2
    with np.load(table.untested(plan)) as file:
        for part in "xy":
            assert np.array_equal(file[f"{part}_test"], file[f"{part}_train"][-100:])
    said.clear()
    assert table.row(plan, name, said.append) == row
    assert not said
    whole = [json.loads(path.read_text()) for path in plan.place.glob("* 4 epochs/result.json")]
    assert {one["config"]["train"]["lr"] for one in whole} == set(METHODS[name].grid["lr"])
    # The stored network, of which a row tells, is not quite the trained one.
    chosen = max(whole, key=lambda one: one["result"]["validation"])
    assert (
        max(one["result"]["validation"] for one in whole if one["config"]["train"]["lr"] == row.settings["lr"])
        == (chosen["result"]["validation"])
    )
    assert table.rows(plan) == [row]
    assert f"| {name} |" in table.text([row]) and f"{row.bytes:,}" in table.text([row])
    assert table.draw(plan).stat().st_size > 1000


def test_a_teacher_and_moved_images_are_offered_to_every_method(plan: table.Plan) -> None:
    network = plan.folder / "teacher"
    train(table.configuration(plan, "teacher", {"lr": 1e-2}, 1, Seeds(format="dense")), network)
    other = replace(plan, teacher=network, shift=1, flip=True)
    row = table.row(other, "dense 2-bit 14x14", lambda line: None)
    assert row is not None and row.options == "shift 1, mirrored, taught by teacher"
    assert row.validation > 0.5
    taught = [json.loads(path.read_text())["config"] for path in other.place.glob("*/result.json")]
    assert len(taught) == 6
    for config in taught:
        assert config["data"]["shift"] == 1 and config["data"]["flip"]
        assert config["train"]["teacher"] == str(network.resolve())
    assert table.rows(plan) == []
