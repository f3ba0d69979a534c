"""Single weights beside seeds: equal to a dense matrix with them put in, in every use."""

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import rbe
from rbe import RbeError, outliers
from rbe.nn import Embedding, Linear
from rbe.outliers import Outliers


def pair() -> tuple[Outliers, Tensor]:
    """Outliers with an empty row and a full one, and the same as a dense matrix."""
    index = torch.tensor([0, 3, 5, 6, 7, 8, 9, 29], dtype=torch.int32)
    few = Outliers((6, 5), index, torch.arange(1.0, 9.0).half())
    dense = torch.zeros(30)
    dense[index.long()] = few.values.float()
    return few, dense.reshape(6, 5)


def test_products_rows_and_sums_are_those_of_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    few, dense = pair()
    base, x = torch.randn(6, 5), torch.randn(2, 3, 5)
    assert torch.equal(few.add_to(base), base + dense)
    assert torch.allclose(few.product(x), x @ dense.T, atol=1e-6)
    monkeypatch.setattr("rbe.outliers._AT_ONCE", 12)
    assert torch.allclose(few.product(x), x @ dense.T, atol=1e-6)
    index = torch.tensor([[1, 2], [5, 1]])
    assert torch.equal(few.add_to_rows(base[index], index), (base + dense)[index])
    assert torch.equal(few.taken_from(base + dense), base + dense - dense)
    assert few.product(x.half()).dtype == torch.float32 and few.product(x.double()).dtype == torch.float64
    none = Outliers((6, 5), few.index[:0], few.values[:0])
    assert torch.equal(none.add_to_rows(base[index], index), base[index]) and not none.product(x).any()


def test_the_largest_are_taken() -> None:
    weight = torch.randn(40, 30)
    few = Outliers.largest(weight, 12)
    smallest = weight.flatten()[few.index.long()].abs().min()
    assert len(few) == 12 and (weight.abs() > smallest).sum() == 11
    assert torch.equal(few.values, weight.flatten()[few.index.long()].half())
    assert torch.isfinite(Outliers.largest(torch.full((2, 2), 1e6), 2).values).all()


@pytest.mark.parametrize("format", ["trellis", "packed128"])
def test_layers_with_outliers_are_differentiable_and_map(format: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 48)
    weight[3, 7] = 40.0
    few = Outliers.largest(weight, 20)
    seeds = rbe.encode(few.taken_from(weight), format=format, effort="fast")
    matrix = rbe.SeedMatrix(seeds.spec, seeds.seeds, seeds.scale, None, few)
    layer = Linear.from_matrix(matrix)
    dense = matrix.decode()
    assert torch.equal(layer.weight, dense) and abs(float(dense[3, 7]) - 40.0) < 0.5
    assert matrix.nbytes == seeds.nbytes + 6 * 20 and layer.matrix.nbytes == matrix.nbytes
    x = torch.randn(4, 48, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x).square().sum().backward()
    assert torch.allclose(x.grad, 2 * (x @ dense.T) @ dense, rtol=1e-3, atol=1e-2)  # type: ignore[arg-type]
    assert torch.allclose(jacrev(layer)(x[0].detach()), dense, atol=1e-3)
    assert torch.allclose(vmap(layer)(x.detach()), layer(x.detach()), atol=1e-3)
    assert layer(x.detach().half()).dtype == torch.float16
    assert torch.equal(layer.half().outlier_values, few.values)


def test_a_table_and_the_head_tied_to_it_share_outliers() -> None:
    weight = torch.randn(50, 32)
    few = Outliers.largest(weight, 30)
    rest = rbe.encode(few.taken_from(weight), format="packed64", block=4)
    table = Embedding.from_matrix(rbe.SeedMatrix(rest.spec, rest.seeds, rest.scale, None, few))
    head = Linear.tied(table)
    index = torch.tensor([4, 49, 0])
    x = torch.randn(2, 32)
    assert torch.allclose(table(index), table.weight[index])
    assert torch.allclose(head(x), x @ table.weight.T, atol=1e-4)
    assert sum("outlier" in name for name in torch.nn.ModuleList([table, head]).state_dict()) == 2
    assert sorted(table.unfreeze().state_dict()) == [
        "angle", "code", "outlier_index", "outlier_values", "radius", "scale"
    ]  # fmt: skip
    assert torch.allclose(table(index), table.weight[index])


def test_what_is_no_outlier_is_refused() -> None:
    few, _ = pair()
    with pytest.raises(RbeError, match="int32 and float16"):
        Outliers((6, 5), few.index.long(), few.values)
    with pytest.raises(RbeError, match="ascend"):
        Outliers((6, 5), few.index.flip(0), few.values)
    with pytest.raises(RbeError, match="ascend"):
        Outliers((5, 5), few.index, few.values)
    with pytest.raises(RbeError, match="NaN"):
        Outliers((6, 5), few.index, few.values * torch.nan)


def kept(seed: int = 0) -> Linear:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 48, generator=g)
    few = Outliers.largest(weight * torch.rand(48, generator=g), 20)
    seeds = rbe.encode(few.taken_from(weight), effort="fast", seed=1)
    return Linear.from_matrix(rbe.SeedMatrix(seeds.spec, seeds.seeds, seeds.scale, None, few))


@pytest.mark.parametrize("inference", [False, True])
def test_a_state_that_is_loaded_after_use_counts(inference: bool) -> None:
    x = torch.randn(2, 48)
    with torch.inference_mode(inference):
        layer, other = kept(), kept(1)
        assert not torch.allclose(layer(x), other(x))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x)) and torch.equal(layer.weight, other.weight)
        bad = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        bad["outlier_index"][5] = -7
        layer.load_state_dict(bad)
        with pytest.raises(RbeError, match="ascend"):
            layer(x)


def test_one_of_two_tensors_is_not_enough() -> None:
    layer = kept()
    for name in ("outlier_index", "outlier_values"):
        tensors = {key: tensor for key, tensor in layer.matrix.to_tensors().items() if key != name}
        with pytest.raises(RbeError, match=rf"{name}.* missing"):
            rbe.SeedMatrix.from_tensors(tensors, layer.spec)
        half = kept()
        setattr(half, name, None)
        with pytest.raises(RbeError, match="without"):
            half(torch.randn(2, 48))


def test_compiled_and_exported_layers_equal_eager_ones() -> None:
    layer, x = kept(), torch.randn(2, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x.requires_grad_()), layer(x))
    few = layer.outliers
    assert few is not None
    table = Embedding.from_matrix(
        rbe.SeedMatrix(few_spec := rbe.encode(torch.randn(32, 48), format="packed64", block=4).spec,
                       torch.zeros(few_spec.blocks, 1, dtype=torch.int64), torch.tensor(1.0), None, few)
    )  # fmt: skip
    index = torch.tensor([[4, 31], [0, 4]])
    with torch.no_grad():
        assert torch.equal(torch.compile(table, fullgraph=True, backend="aot_eager")(index), table(index))
    exported = torch.export.export(layer, (x.detach(),)).module()
    assert torch.equal(exported(x), layer(x))
    torch.library.opcheck(outliers.outlier_rows, (index, few.index, few.values, 32, 48))
