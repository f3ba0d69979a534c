"""Bits spread over matrices: the best within the bytes, by sensitivities that noise confirms."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from rbe import budget, compress_, convert, sensitivity
from rbe.allocate import make_plan
from rbe.calibrate import answer_of, call, random_tokens
from rbe.errors import RbeError

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sensitivity.INPUTS, "tokens", 2048)


def test_as_good_as_trying_everything() -> None:
    g = torch.Generator().manual_seed(0)
    names, rates = "abcd", (1.0, 2.0, 3.0)
    for _ in range(50):
        found = dict(zip(names, (10 ** (3 * torch.rand(4, generator=g))).tolist(), strict=True))
        sizes = {name: {rate: int(rate * 100) for rate in rates} for name in names}
        total = 100 * int(torch.randint(4, 13, (), generator=g))

        def cost(chosen: dict[str, float], found: dict[str, float] = found) -> float:
            return sum(found[name] * budget.ERRORS[rate] for name, rate in chosen.items())

        chosen = budget.spread(found, sizes, total)
        assert sum(sizes[name][rate] for name, rate in chosen.items()) <= total
        every = (dict(zip(names, some, strict=True)) for some in itertools.product(rates, repeat=4))
        best = min(cost(one) for one in every if sum(sizes[n][r] for n, r in one.items()) <= total)
        assert cost(chosen) == pytest.approx(best)


def test_bytes_left_over_go_to_whom_they_fit() -> None:
    sizes = {"large": {1.0: 100, 2.0: 200}, "small": {1.0: 10, 2.0: 20}}
    assert budget.spread({"large": 1e6, "small": 1e-6}, sizes, 150) == {"large": 1.0, "small": 2.0}
    with pytest.raises(RbeError, match="lowest rates"):
        budget.spread({"large": 1.0, "small": 1.0}, sizes, 109)


def test_gradients_tell_what_noise_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8, bias=False))
    model[0].weight.data.mul_(torch.linspace(0.2, 2, 40)[:, None])  # rows of different size
    model[2].weight.data.mul_(torch.linspace(0.2, 2, 8)[:, None])
    x = torch.randn(256, 24)
    weights = {"0.weight": False, "2.weight": True}
    found = sensitivity.sensitivities(model, weights, x.split(8))
    reference = model(x)
    for name, by_row in weights.items():
        p = model.get_parameter(name)
        kept, seen = p.data.clone(), 0.0
        for _ in range(200):
            noise = torch.randn(p.shape) * (
                kept.norm(dim=1, keepdim=True) / p.shape[1] ** 0.5 if by_row else kept.std()
            )
            p.data = kept + 1e-2 * noise
            change = model(x) - reference
            change = torch.stack([one - one.mean(0) for one in change.split(8)])  # what all rows share does not count
            seen += change.square().sum(-1).mean().item() / reference.square().sum(1).mean().item() / 1e-4 / 200
        p.data = kept
        assert found[name].sum().item() == pytest.approx(seen, rel=0.15)
        assert p.requires_grad and p.grad is None


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    return transformers.BertModel(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=200, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [bert, gpt2])
def test_answers_come_nearer_at_the_same_bytes(make) -> None:
    plain, spread, dense = make(), make(), make()
    for model in (plain, spread, dense):  # what a fresh model lacks: layers that matter more than others
        for number, block in enumerate(model.encoder.layer if make is bert else model.transformer.h):
            for p in block.parameters():
                p.data.mul_(4.0 if number else 0.5)
    one = compress_(plain, bits=2, effort="fast")
    two = compress_(spread, bits=2, effort="fast", allocate="random")
    assert two.nbytes <= one.nbytes < two.nbytes + 2000 and len({e.spec.bits for e in two.seeded if e.spec}) > 1
    batch = list(random_tokens(200, context=32, tokens=1024, seed=5))[-1]
    with torch.inference_mode():
        reference, a, b = (answer_of(call(m, batch)) for m in (dense, plain, spread))
    assert (b - reference).square().mean() < 0.9 * (a - reference).square().mean()


def test_what_the_answer_does_not_hang_on_keeps_its_rate() -> None:
    plan = compress_(bert(), bits=3, effort="fast", allocate="random")
    assert next(e for e in plan.seeded if "pooler" in e.name).spec.bits == 2.0
    plan = compress_(bert(), bits=2.2, effort="fast", allocate="random", rates={"*query": 4.0}, embeddings_bits=1)
    rates = {e.name: e.spec.bits for e in plan.seeded}
    assert {r for n, r in rates.items() if "query" in n} == {4.0}
    assert {r for n, r in rates.items() if "embeddings" in n} == {1.0}


def test_given_inputs_of_any_model() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight.data.mul_(1e-3)
    model[2].bias.data.mul_(100)
    plan = compress_(model, bits=2, effort="fast", allocate=[torch.randn(40, 64)])
    assert len(plan.seeded) == 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def _bytes(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def test_an_interrupted_run_goes_on_with_the_rates_it_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"bits": 2.3, "effort": "fast", "allocate": "random", "fingerprint": lambda _: {}}
    whole = convert.compress(folder, tmp_path / "whole", **options)
    seen = set()

    def stop(event: convert.Progress) -> None:
        if event.stage == "encode":
            seen.add(event.name)
            if len(seen) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.compress(folder, tmp_path / "again", **options, progress=stop)
    # As another number of threads could make them.
    same = torch.tensor(1.0)
    monkeypatch.setattr(sensitivity, "sensitivities", lambda model, weights, batches: dict.fromkeys(weights, same))
    again = convert.compress(folder, tmp_path / "again", **options)
    assert again.resumed > 0 and _bytes(again.path) == _bytes(whole.path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allocate": "no such file"}, "allocate: .* is no file"),
        ({"allocate": "random", "format": "packed64"}, "trellis"),
        ({"allocate": "random", "bits": 5}, "0.5 to 4"),
        ({"allocate": "random", "bits": float("nan")}, "0.5 to 4"),
    ],
)
def test_bad_ways(folder: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(RbeError, match=words):
        convert.compress(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_inputs() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(RbeError, match="cannot be run"):
        sensitivity.sensitivities(model, {"0.weight": False}, [torch.randn(2, 3)])
    with pytest.raises(RbeError, match="no inputs"):
        sensitivity.sensitivities(model, {"0.weight": False}, [])
    model[0].weight.data.fill_(float("inf"))
    with pytest.raises(RbeError, match="NaN"):
        sensitivity.sensitivities(model, {"0.weight": False}, [torch.randn(2, 16)])
    assert model[0].weight.requires_grad


def test_one_input_or_matrices_without_effect_tell_nothing(folder: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(RbeError, match="tell no matrices apart"):
        sensitivity.sensitivities(model, {"0.weight": False}, [torch.randn(1, 16)])
    with pytest.raises(RbeError, match="tell no matrices apart"):
        compress_(bert(), effort="fast", allocate="random", include=["*pooler*"])


def test_names_that_are_patterns_mean_themselves() -> None:
    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Linear(64, 64), "plain": nn.Linear(64, 64)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.parts.values()
            return first(x) + 0.1 * second(x)

    found = []
    for name in ("first", "a[0]", "*", "p?ain"):
        torch.manual_seed(0)
        model = Named(name)
        plan = compress_(model, bits=2.2, effort="fast", allocate=[torch.randn(40, 64)])
        found.append([e.spec.bits for e in plan.seeded if e.spec])
    assert len(set(found[0])) == 2 and all(rates == found[0] for rates in found)


def test_complaints_name_the_option_that_was_asked_for(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A line.\n")
    with pytest.raises(RbeError, match=r"^allocate: text needs the model's tokenizer"):
        convert.compress(folder, tmp_path / "out", effort="fast", allocate=tmp_path / "text.txt")
    with pytest.raises(RbeError, match="is no share"):
        convert.compress(folder, tmp_path / "out", outliers="many")  # type: ignore[arg-type]


def test_extreme_weights_are_kept_by_themselves(folder: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Embedding(64, 64))
    model[0].weight.data[3, 4] = 9.0
    model[1].weight.data[3, 4] = 90.0  # rows of an embedding have scales of their own
    plan = compress_(model, effort="fast")
    assert [e.outliers for e in plan.seeded] == [1, 0]
    assert abs(float(model[0].weight[3, 4]) - 9.0) < 0.1
    assert [e.outliers for e in make_plan({"a.weight": ((64, 64), "F32")}, extremes={"a.weight": 3}, outliers=0.0)] == [
        0
    ]
    done = convert.compress(folder, tmp_path / "out", effort="fast", fingerprint=lambda _: {})
    assert not any(e.outliers for e in done.plan.seeded)
