"""`rbe.nn.Linear`: it equals the dense layer it stands for, and stays itself through torch's handling of modules."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import rbe.nn
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix


def random_matrix(rows: int, columns: int, rotation: tuple[int, int] = (5, 9), row_scale: bool = False) -> SeedMatrix:
    """A matrix of random seeds whose weights are about 1 / sqrt(columns)."""
    spec = SeedSpec("trellis", (rows, columns), 2.0, window=12, rotation=rotation)
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    seeds = torch.randint(-(1 << 63), (1 << 63) - 1, (spec.blocks, 8), generator=generator)
    factor = torch.rand(rows, generator=generator).add(0.5).half() if row_scale else None
    return SeedMatrix(spec, seeds, torch.tensor(columns**-0.5 / 148), factor)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_forward_equals_the_dense_layer(bias: bool, lead: tuple[int, ...]) -> None:
    matrix = random_matrix(40, 24)
    b = torch.randn(40) if bias else None
    layer = rbe.nn.Linear.from_matrix(matrix, b)
    x = torch.randn(*lead, 24)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            y = layer(x)
        expected = nn.functional.linear(x, matrix.decode(), b)
        assert y.shape == expected.shape and y.dtype == x.dtype
        assert y.numel() == 0 or close(y, expected)


def test_gradients_reach_the_input_and_the_bias() -> None:
    layer = rbe.nn.Linear.from_matrix(random_matrix(40, 24), torch.zeros(40))
    x = torch.randn(5, 24, requires_grad=True)
    g = torch.randn(5, 40)
    layer(x).backward(g)
    assert x.grad is not None and close(x.grad, g @ layer.matrix.decode())
    assert isinstance(layer.bias, nn.Parameter) and layer.bias.grad is not None and close(layer.bias.grad, g.sum(0))


def test_it_is_not_torchs_linear() -> None:
    layer = rbe.nn.Linear(24, 40)
    assert not isinstance(layer, nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert (layer.in_features, layer.out_features) == (24, 40)


def test_fresh_weights_have_torchs_variance() -> None:
    torch.manual_seed(0)
    layer = rbe.nn.Linear(256, 512, bits=2, rotation=(1, 2))
    assert float(layer.weight.std()) == pytest.approx((3 * 256) ** -0.5, rel=0.1)


def test_weight_is_decoded_and_read_only() -> None:
    layer = rbe.nn.Linear.from_matrix(random_matrix(40, 24), torch.zeros(40))
    assert layer.weight.shape == (40, 24) and layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, layer.matrix.decode())
    assert layer.weight._is_hf_initialized
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(40, 24))
    assert "weight" not in layer.state_dict()
    flipped = rbe.nn.Linear.from_matrix(random_matrix(40, 24), transposed=True)
    assert torch.equal(flipped.weight, layer.weight.T)


@pytest.mark.parametrize("row_scale", [False, True])
def test_casts_move_the_bias_and_leave_the_scales(row_scale: bool) -> None:
    matrix = random_matrix(40, 24, rotation=(0, 9), row_scale=row_scale)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer = rbe.nn.Linear.from_matrix(matrix, torch.randn(40))
        layer.to(dtype)
        assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, matrix.scale)
        assert layer.seeds.dtype == torch.int64
        assert row_scale == (layer.row_scale is not None)
        if layer.row_scale is not None and matrix.row_scale is not None:
            assert layer.row_scale.dtype == torch.float16 and torch.equal(layer.row_scale, matrix.row_scale)
        assert layer.bias is not None and layer.bias.dtype == dtype
        assert layer.weight.dtype == dtype
        assert layer(torch.randn(3, 24, dtype=dtype)).dtype == dtype


def test_default_dtype_does_not_leak_into_the_buffers() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = rbe.nn.Linear(24, 40, row_scale=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (layer.scale.dtype, layer.seeds.dtype) == (torch.float32, torch.int64)
    assert layer.row_scale is not None and layer.row_scale.dtype == torch.float16
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16 and layer.weight_dtype == torch.bfloat16


def test_copies_pickles_and_state_dicts_compute_the_same() -> None:
    layer = rbe.nn.Linear.from_matrix(random_matrix(40, 24), torch.randn(40))
    x = torch.randn(3, 24)
    with torch.inference_mode():
        y = layer(x)  # prepares whatever the fast path keeps
        stream = io.BytesIO()
        torch.save(layer.state_dict(), stream)
        stream.seek(0)
        other = rbe.nn.Linear(24, 40, window=12, rotation=(5, 9))
        other(x)
        other.load_state_dict(torch.load(stream))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            assert torch.equal(twin(x), y)
            assert twin.seeds.data_ptr() != layer.seeds.data_ptr()


def test_new_seeds_are_seen_after_a_forward_pass() -> None:
    layer = rbe.nn.Linear.from_matrix(random_matrix(32, 32), None)
    x = torch.randn(2, 32)
    with torch.inference_mode():
        before = layer(x)
        layer.scale.mul_(2)
        assert close(layer(x), 2 * before)
        layer.scale = layer.scale * 0.5
        assert close(layer(x), before)
        layer.seeds.zero_()
        assert close(layer(x), nn.functional.linear(x, layer.weight))
        layer.load_state_dict(rbe.nn.Linear.from_matrix(random_matrix(32, 32), None).state_dict(), assign=True)
        assert torch.equal(layer(x), before)


def test_meta_construction_and_loading() -> None:
    matrix = random_matrix(40, 24)
    layer = rbe.nn.Linear.from_spec(matrix.spec, True, device="meta")
    assert layer.seeds.is_meta and layer.weight.is_meta and layer.weight.shape == (40, 24)
    layer.load_state_dict({**matrix.to_tensors(), "bias": torch.zeros(40)}, assign=True)
    assert torch.equal(layer.weight, matrix.decode())
    empty = rbe.nn.Linear(24, 40, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert bool(torch.isfinite(empty.weight).all())


def test_wrong_parts_are_refused() -> None:
    matrix = random_matrix(40, 24)
    with pytest.raises(RbeError, match="bias is \\(24,\\), but the matrix has 40 rows"):
        rbe.nn.Linear.from_matrix(matrix, torch.zeros(24))
    with pytest.raises(RbeError, match="choose one of"):
        rbe.nn.Linear(24, 40, bits=5)
    with pytest.raises(RbeError):
        rbe.nn.Linear.from_matrix(matrix)(torch.randn(3, 25))
    layer = rbe.nn.Linear.from_matrix(matrix)
    layer.load_state_dict({**matrix.to_tensors(), "scale": torch.tensor(1.0, dtype=torch.float64)}, assign=True)
    with pytest.raises(RbeError, match="scale is"):
        _ = layer.matrix


def test_tied_head_stores_nothing_and_follows_its_owner() -> None:
    table = rbe.nn.Embedding.from_matrix(random_matrix(40, 24, rotation=(0, 9), row_scale=True))
    model = nn.ModuleDict({"table": table, "head": rbe.nn.Linear.tied(table, torch.randn(40))})
    assert sorted(model.state_dict()) == ["head.bias", "table.row_scale", "table.scale", "table.seeds"]
    twin = copy.deepcopy(model)
    assert twin["head"].owner is twin["table"]
    x = torch.randn(3, 24)
    head = model["head"]
    assert close(head(x), nn.functional.linear(x, table.weight, head.bias))
    assert head.seeds is table.seeds
    table.scale.mul_(3)
    assert close(head(x), nn.functional.linear(x, table.weight, head.bias))
    assert "tied" in repr(head)


def test_activations_are_set_on_every_layer() -> None:
    model = nn.Sequential(rbe.nn.Linear(256, 64), nn.ReLU(), nn.Sequential(rbe.nn.Linear(64, 32)))
    x = torch.randn(8, 256)
    with torch.inference_mode():
        exact = model(x)
        assert rbe.nn.set_activations(model, "int8") is model
        rough = model(x)
    error = float((rough - exact).norm() / exact.norm())
    assert 0 < error < 0.02
    with pytest.raises(RbeError, match="int4"):
        rbe.nn.set_activations(model, "int4")


def test_repr_says_the_rate() -> None:
    text = repr(rbe.nn.Linear.from_matrix(random_matrix(64, 64), torch.zeros(64)))
    assert "in_features=64, out_features=64, bias=True" in text and "bits=2 (2.01 stored)" in text


def test_compile_gives_the_same_result() -> None:
    layer = rbe.nn.Linear.from_matrix(random_matrix(40, 24), torch.randn(40))
    x = torch.randn(3, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
