"""`compress_`: any torch model, in place, all or nothing."""

import copy

import pytest
import torch
import transformers
from elsewhere import NAME, elsewhere
from torch import Tensor, nn

import rbe
from rbe.compress import plan_model


class Language(nn.Module):
    """A table, a body and a head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(80, 48)
        self.body = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48), nn.LayerNorm(48))
        self.head = nn.Linear(48, 80, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.table(index)))
        return out


def seeded(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, rbe.nn.Seeded)]


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.LSTM(32, 32)])
def test_a_bare_layer_is_kept_with_the_reason(layer: nn.Module) -> None:
    plan = rbe.compress_(layer, effort="fast")
    assert {entry.reason.partition(";")[0] for entry in plan if len(entry.shape) == 2} == {"it is the whole model"}


def test_layers_are_swapped_and_compute_what_was_encoded() -> None:
    torch.manual_seed(0)
    model = Language().eval()
    dense = copy.deepcopy(model)
    index = torch.randint(0, 80, (2, 9))
    plan = rbe.compress_(model, bits=4, effort="fast")
    assert seeded(model) == ["table", "body.0", "body.2", "head"]
    assert [entry.name for entry in plan.seeded] == ["table.weight", "body.0.weight", "body.2.weight"]
    weight = dense.body[0].weight.detach()
    assert float((model.body[0].weight - weight).norm() / weight.norm()) < 0.09
    with torch.inference_mode():
        assert float((model(index) - dense(index)).norm() / dense(index).norm()) < 0.2
    restored = rbe.decompress_(copy.deepcopy(model))
    assert torch.allclose(restored(index), model(index), atol=1e-4)
    assert restored.head.weight is restored.table.weight and seeded(restored) == []


def test_encoding_is_reproducible() -> None:
    torch.manual_seed(0)
    dense = Language()
    one, two = copy.deepcopy(dense), copy.deepcopy(dense)
    rbe.compress_(one, effort="fast")
    rbe.compress_(two, effort="fast", threads=1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_patterns_and_rates() -> None:
    model = Language()
    rbe.compress_(model, bits=1, effort="fast", embeddings_bits=4, exclude=["body.2"])
    assert [module.spec.bits for module in (model.table, model.body[0])] == [4, 1]
    assert isinstance(model.body[2], nn.Linear)
    model = Language()
    rbe.compress_(model, effort="fast", embeddings_bits=0, include=["body.*", "table"])
    assert seeded(model) == ["body.0", "body.2"]


def test_thin_layers_are_kept_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    plan = rbe.compress_(model, effort="fast")
    assert seeded(model) == ["0"]
    assert "thin" in next(entry.reason for entry in plan if entry.name == "1.weight")


def test_progress_counts_weights_up_to_all() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    calls: list[tuple[int, int]] = []
    rbe.compress_(model, effort="fast", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (64 * 64 + 64 * 32, 64 * 64 + 64 * 32)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"effort": "heroic"}, "heroic"),
        ({"include": ["nothing*"]}, "nothing"),
        ({"exclude": ["body.9"]}, "body.9"),
        ({"format": "packed128", "block": "abc"}, "block 'abc' is not an int"),
        ({"format": "packed64", "block": 10**6}, "would pad the matrix"),
    ],
)
def test_a_wrong_request_changes_nothing(wrong: dict[str, object], message: str) -> None:
    model = Language()
    with pytest.raises(rbe.RbeError, match=message):
        rbe.compress_(model, **{"effort": "fast", **wrong})  # type: ignore[arg-type]
    assert seeded(model) == []


def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    model = Language()
    with torch.no_grad():
        model.body[2].weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(rbe.RbeError):
        rbe.compress_(model, effort="fast")
    assert seeded(model) == [] and model.head.weight is model.table.weight
    assert all(torch.equal(a.nan_to_num(), before[k].nan_to_num()) for k, a in model.state_dict().items())


def test_twice_is_refused() -> None:
    model = Language()
    rbe.compress_(model, effort="fast")
    with pytest.raises(rbe.RbeError, match="already"):
        rbe.compress_(model, effort="fast")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64)).to(dtype)
    rbe.compress_(model, effort="fast")
    assert model(torch.arange(5)).dtype == dtype and model[1].weight.dtype == dtype


def test_layers_stay_on_their_device() -> None:
    torch.manual_seed(0)
    here, index = nn.Sequential(nn.Embedding(80, 48), nn.Linear(48, 64), nn.LSTM(64, 32)), torch.arange(12)[None]
    with elsewhere():
        there = copy.deepcopy(here).to(NAME)
        rbe.compress_(there, effort="fast", outliers=0.02)
        rbe.compress_(here, effort="fast", outliers=0.02)
        assert seeded(there) == seeded(here)
        assert all(t.device.type == NAME for t in there.state_dict().values())
        torch.testing.assert_close(there(index.to(NAME))[0].cpu(), here(index)[0], rtol=1e-4, atol=1e-5)
        rbe.decompress_(there)
        assert all(t.device.type == NAME for t in there.state_dict().values())
        torch.testing.assert_close(there(index.to(NAME))[0].cpu(), here(index)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["allocate", "calibrate"])
def test_inputs_find_a_model_on_its_device(option: str) -> None:
    sides = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    here = transformers.BertModel(transformers.BertConfig(vocab_size=96, max_position_embeddings=32, **sides)).eval()
    index = torch.arange(12)[None]
    with elsewhere():
        there = copy.deepcopy(here).to(NAME)
        plans = [rbe.compress_(model, bits=2, effort="fast", **{option: "random"}) for model in (there, here)]
        rates = [[(entry.module, entry.spec and entry.spec.bits) for entry in plan] for plan in plans]
        assert rates[0] == rates[1]
        answers = [model(x).last_hidden_state.cpu() for model, x in ((there, index.to(NAME)), (here, index))]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def test_a_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = Language()
    model.head.weight = model.table.weight
    plan, sites = plan_model(model)
    assert sites["table.weight"].shared == ("head",)
    assert {entry.name: entry.stored for entry in plan}["head.weight"] is False


def test_torchs_transformer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 6, 64)
    with torch.inference_mode():
        before = layer(x)
        plan = rbe.compress_(layer, bits=4, effort="fast")
        after = layer(x)
    assert seeded(layer) == ["linear1", "linear2"]
    reasons = {entry.name: entry.reason for entry in plan}
    assert "MultiheadAttention" in reasons["self_attn.out_proj.weight"] and reasons["self_attn.in_proj_weight"]
    assert float((after - before).norm() / before.norm()) < 0.1
