"""Finding, replacing and restoring layers: what is shared stays shared, what cannot be swapped says why."""

import copy

import pytest
import torch
from test_linear import close, random_matrix
from torch import Tensor, nn

import rbe.nn
from rbe.errors import RbeError
from rbe.nn import swap


def swap_all(model: nn.Module) -> nn.Module:
    """Every site replaced by random seeds."""
    for site in swap.find(model):
        if site.kind != "keep":
            embedding = site.kind == "embedding"
            swap.replace(model, site, random_matrix(*site.shape, rotation=(0, 9) if embedding else (5, 9)))
    return model


class Conv1D(nn.Module):
    """The layer of transformers' GPT-2, which stores its weight (in, out); recognised by its name alone."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Language(nn.Module):
    """A table, a body, and a head tied to the table by sharing its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32, padding_idx=0)
        self.body = nn.Sequential(Conv1D(48, 32), nn.GELU(), nn.Linear(48, 32))
        self.head = nn.Linear(32, 50, bias=True)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.table(index)))
        return out


def test_find_names_kinds_and_shapes() -> None:
    found = {site.module: site for site in swap.find(Language())}
    assert list(found) == ["table", "body.0", "body.2"]
    assert (found["table"].kind, found["table"].shape, found["table"].shared) == ("embedding", (50, 32), ("head",))
    assert (found["body.0"].shape, found["body.0"].transposed) == ((48, 32), True)
    assert (found["body.2"].shape, found["body.2"].transposed) == ((32, 48), False)


def test_the_table_owns_the_weight_wherever_the_head_stands() -> None:
    table, head = nn.Embedding(50, 32), nn.Linear(32, 50)
    head.weight = table.weight
    (site,) = swap.find(nn.ModuleDict({"head": head, "table": table}))
    assert (site.module, site.kind, site.shared) == ("table", "embedding", ("head",))


def test_patterns() -> None:
    model = Language()
    kept = {site.module: site.reason for site in swap.find(model, include=["body.*"]) if site.kind == "keep"}
    assert kept == {"table": "not included"}
    kept = {
        site.module: site.reason for site in swap.find(model, exclude=["head", "*.2.weight"]) if site.kind == "keep"
    }
    assert kept == {"table": "excluded", "body.2": "excluded"}


def test_swap_computes_what_the_decoded_model_computes_and_restores() -> None:
    model = swap_all(Language())
    index = torch.randint(0, 50, (2, 7))
    y = model(index)
    assert not any(isinstance(m, nn.Linear | nn.Embedding) for m in model.modules())
    assert sorted(k for k in model.state_dict() if k.startswith(("table", "head"))) == [
        "head.bias", "table.scale", "table.seeds",
    ]  # fmt: skip
    assert model.table.padding_idx == 0
    body = copy.deepcopy(model)
    body.body[0] = nn.Identity()  # transformers' own Conv1D would be built on restoring
    swap.decompress_(body)
    assert isinstance(body.table, nn.Embedding) and isinstance(body.head, nn.Linear)
    assert body.head.weight is body.table.weight and body.table.padding_idx == 0
    hidden = nn.functional.gelu(body.table(index) @ model.body[0].weight + model.body[0].bias)
    assert close(body.head(body.body[2](hidden)), y)


def test_a_shared_module_stays_shared() -> None:
    layer = nn.Linear(32, 32)
    model = swap_all(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2] and isinstance(model[0], rbe.nn.Linear)
    swap.decompress_(model)
    assert model[0] is model[2] and isinstance(model[0], nn.Linear)


def test_three_modules_on_one_parameter_keep_one_matrix() -> None:
    tables = nn.ModuleList(nn.Embedding(50, 32) for _ in range(3))
    for table in tables:
        table.weight = tables[0].weight
    swap_all(tables)
    assert sorted(tables.state_dict()) == ["0.scale", "0.seeds"]
    assert all(table.owner is tables[0] for table in tables)


def test_hooks_mode_and_bias_survive() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    bias = model[0].bias
    swap_all(model)(torch.zeros(32))
    assert seen == [1] and model[0].bias is bias and not model[0].training


class Peeking(nn.Module):
    """Reads the weight of its layer instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight).to(self.inner.weight.dtype)


def test_models_that_read_the_weight_are_right() -> None:
    model = swap_all(Peeking())
    x = torch.randn(3, 32)
    assert close(model(x), x @ model.inner.matrix.decode().T)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


class Scaled(nn.Embedding):
    """A subclass with a forward of its own."""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(Scaled(50, 32)), "of its own"),
        (nn.Sequential(nn.Embedding(50, 32, max_norm=1.0)), "max_norm"),
        (nn.Sequential(nn.Embedding(50, 32, sparse=True, scale_grad_by_freq=True)), "sparse, scale_grad_by_freq"),
        (nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(32, 32))), None),
        (nn.Linear(32, 32), "whole model"),
        (nn.MultiheadAttention(32, 4), "MultiheadAttention"),
    ],
)  # fmt: skip
def test_what_cannot_be_swapped_says_why(model: nn.Module, reason: str | None) -> None:
    sites = swap.find(model)
    assert all(site.kind == "keep" for site in sites)
    assert (sites == []) if reason is None else (reason in sites[0].reason)


def test_a_weight_used_elsewhere_is_kept() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    model.register_parameter("copy", model[0].weight)
    (site,) = swap.find(model)
    assert site.kind == "keep" and "copy" in site.reason


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_layer_in_its_fused_path(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    sites = {site.module: site for site in swap.find(model)}
    assert sites["layers.0.self_attn.out_proj"].kind == "keep" and sites["layers.0.linear1"].kind == "linear"
    nested = model.use_nested_tensor
    swap_all(model)
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 4 + [True], [False] * 5])
    with torch.inference_mode():
        fast = model(x, src_key_padding_mask=mask)
    slow = model(x, src_key_padding_mask=mask)
    dense = swap.decompress_(copy.deepcopy(model))
    assert dense.use_nested_tensor == nested and dense.layers[0].activation_relu_or_gelu == 1
    with torch.inference_mode():
        expected = dense(x, src_key_padding_mask=mask)
    assert close(fast[~mask], expected[~mask]) and close(slow[~mask], expected[~mask])


def test_the_fused_path_does_not_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swap_all(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)).eval()

    def forbidden(self: rbe.nn.Linear) -> Tensor:
        raise AssertionError("a weight was decoded")

    monkeypatch.setattr(rbe.nn.Seeded, "weight", property(forbidden))
    with torch.inference_mode():
        model.layers[0](torch.randn(2, 5, 32))
        model(torch.randn(2, 5, 32))


def test_a_matrix_of_another_shape_is_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    with pytest.raises(RbeError, match=r"0: the layer is \(48, 32\), but the seeds make \(32, 48\)"):
        swap.replace(model, swap.find(model)[0], random_matrix(32, 48))
    assert isinstance(model[0], nn.Linear)


def test_describe_rebuilds_on_meta() -> None:
    model = swap_all(Language())
    entries = swap.describe(model)
    assert entries["table"]["tied"] == ["head"] and entries["body.0"]["transposed"]
    with torch.device("meta"):
        other = Language()
        other.head.weight = other.table.weight
    for site in swap.find(other):
        spec = rbe.nn.seeded.SeedSpec.from_json(entries[site.module]["spec"])
        swap.place(other, site, spec, entries[site.module]["row_scale"])
    other.load_state_dict(model.state_dict(), assign=True)
    index = torch.randint(0, 50, (2, 7))
    assert torch.equal(other(index), model(index))
    assert swap.describe(other) == entries
