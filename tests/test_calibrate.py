"""Calibration: what is measured, that it pays on outputs, the converter with it, and inputs that cannot work."""

from pathlib import Path

import pytest
import torch
from torch import nn

from rbe import calibrate, compress_, convert
from rbe.errors import RbeError

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "TOKENS", 2048)


@pytest.fixture(params=["bert", "gpt2", "llama"])
def small(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "bert":
        config = transformers.BertConfig(
            vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
        return transformers.BertModel(config).eval()
    if request.param == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=200, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_random_tokens_repeat_and_fit() -> None:
    one, two = ([b["input_ids"] for b in calibrate.random_tokens(50, context=32, tokens=4096)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    everything = torch.cat([ids.flatten() for ids in one])
    assert max(ids.shape[1] for ids in one) == 32
    assert everything.min() >= 0 and everything.max() < 50
    assert (everything < 5).float().mean() > 0.2  # frequent ones come often


def test_moments_are_those_of_the_inputs() -> None:
    layer = nn.Linear(6, 1, bias=False)  # one output: every row is worth the same
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0)
    found = calibrate.second_moments(nn.Sequential(layer), ["0"], [x[:200], x[200:]], damping=0.25)["0"]
    H = x.double().T @ x.double()
    torch.testing.assert_close(found, H / H.diagonal().mean() + 0.25 * torch.eye(6, dtype=torch.float64))
    assert layer.weight.requires_grad and layer.weight.grad is None


def test_a_row_behind_a_normalisation_is_not_worth_more_for_being_large() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8, elementwise_affine=False))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e4
    H = calibrate.second_moments(model, ["0"], [x], damping=0.0)["0"]
    assert torch.linalg.eigvalsh(H)[-1] / H.trace() < 0.5


def test_outputs_come_nearer(small: nn.Module) -> None:
    import copy

    for name, p in small.named_parameters():  # what a fresh model lacks: features of very different size
        if "norm" in name.lower() or "ln_" in name:
            p.data.mul_(torch.linspace(2, -5, p.numel()).exp() + 0.05)
    batch = list(calibrate.random_tokens(200, context=32, tokens=2048, seed=9))[-1]
    plain, better = copy.deepcopy(small), copy.deepcopy(small)
    options = {"bits": 2, "effort": "fast", "embeddings_bits": 0}
    compress_(plain, **options)
    compress_(better, **options, calibrate="random")
    with torch.inference_mode():
        reference, one, two = (calibrate.answer_of(m(**batch)) for m in (small, plain, better))
    assert (two - reference).square().mean() < 0.9 * (one - reference).square().mean()


def test_given_inputs() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    plan = compress_(model, effort="fast", calibrate=[torch.randn(100, 64)])
    assert len(plan.seeded) == 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def _bytes(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def test_resumes_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    options = {"bits": 2, "effort": "fast", "calibrate": "random", "fingerprint": lambda _: {}}
    whole = convert.compress(folder, tmp_path / "whole", **options)
    plain = convert.compress(folder, tmp_path / "plain", **{**options, "calibrate": None})
    assert whole.path != plain.path and _bytes(whole.path) != _bytes(plain.path)
    seen = []

    def stop(event: convert.Progress) -> None:
        if event.stage == "encode":
            seen.append(event.name)
            if len(set(seen)) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.compress(folder, tmp_path / "again", **options, progress=stop)
    again = convert.compress(folder, tmp_path / "again", **options)
    assert 0 < again.resumed < len(again.encoded)
    assert _bytes(again.path) == _bytes(whole.path)


def test_moments_in_several_turns_change_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rbe.convert import calibration

    options = {"bits": 2, "effort": "fast", "calibrate": "random", "fingerprint": lambda _: {}}
    whole = convert.compress(folder, tmp_path / "whole", **options)
    monkeypatch.setattr(calibration, "AT_ONCE", 8 * 64 * 64)
    parts = convert.compress(folder, tmp_path / "parts", **options)
    assert _bytes(parts.path) == _bytes(whole.path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": "no such file"}, "no file"),
        ({"calibrate": "random", "format": "packed64"}, "trellis"),
        ({"calibrate": "TEXT"}, "tokenizer"),
    ],
)
def test_bad_ways(folder: Path, tmp_path: Path, options: dict[str, str], words: str) -> None:
    (tmp_path / "text.txt").write_text("A line.\n")
    if options["calibrate"] == "TEXT":
        options = {"calibrate": str(tmp_path / "text.txt")}
    with pytest.raises(RbeError, match=words):
        convert.compress(folder, tmp_path / "out", effort="fast", **options)
    assert not (tmp_path / "out").exists()


def test_bare_file_cannot_be_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RbeError, match="cannot be run"):
        convert.compress(folder / "model.safetensors", tmp_path / "out", calibrate="random")


def test_bad_models_and_inputs() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(RbeError, match="does not fit"):
        compress_(model, calibrate="random")
    with pytest.raises(RbeError, match="cannot be run"):
        compress_(model, calibrate=[torch.randn(3, 5)])
    with pytest.raises(RbeError, match="NaN"):
        compress_(model, calibrate=[torch.full((3, 64), torch.nan)])
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    with pytest.raises(RbeError, match="no line"):
        list(calibrate.text_tokens(["", " "], lambda line, verbose: {"input_ids": []}))


class Around(nn.Module):
    """Two layers with something of a user's own around them."""

    def __init__(self, run) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Linear(16, 16), nn.Linear(16, 16), run

    def forward(self, x: torch.Tensor):
        return self.run(self, x)


def test_layers_may_be_called_by_name_and_change_their_outputs_in_place() -> None:
    x = [torch.randn(30, 16, generator=torch.Generator().manual_seed(0))]
    ways = (
        lambda m, x: m.b(m.a(x).relu()),
        lambda m, x: m.b(input=m.a(input=x).relu()),
        lambda m, x: m.b(m.a(x).relu_()),
    )
    torch.manual_seed(0)
    model = Around(ways[0])
    plain, *others = [calibrate.second_moments(model, ["a", "b"], x) for model.run in ways]
    for found in others:
        assert all(torch.equal(plain[name], found[name]) for name in plain)
    with torch.inference_mode():  # where a user may stand
        assert torch.equal(calibrate.second_moments(model, ["a"], x)["a"], plain["a"])


def test_an_input_that_is_gone_is_not_taken_for_what_stands_in_its_place() -> None:
    model = Around(lambda m, x: (h := x + 0, y := m.a(h), h.add_(1), m.b(y))[-1])
    with pytest.raises(RbeError, match="changes the input of a in place"):
        calibrate.second_moments(model, ["a", "b"], [torch.randn(30, 16)])


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda m, x: _raise(KeyError("k")), "cannot be run .*KeyError"),
        (lambda m, x: _raise(AssertionError()), "cannot be run .*AssertionError"),
        (lambda m, x: {}, "cannot be run"),
        (lambda m, x: m.a(x).detach(), "no gradient"),
        (lambda m, x: m.a(x).argmax(-1), "no gradient"),
    ],
)
def test_models_that_tell_nothing(run, words: str) -> None:
    model = Around(run)
    model.a.eval()
    with pytest.raises(RbeError, match=words):
        compress_(model, effort="fast", include=["a"], calibrate=[torch.randn(3, 16)])
    assert model.training and not model.a.training and model.b.training and type(model.a) is nn.Linear


@pytest.mark.parametrize("inputs", [[], 3, [torch.randn(0, 64)]])
def test_inputs_that_are_none(inputs) -> None:
    with pytest.raises(RbeError, match=r"no inputs|cannot be run"):
        compress_(nn.Sequential(nn.Linear(64, 64)), effort="fast", calibrate=inputs)


@pytest.mark.parametrize("option", ["calibrate", "allocate"])
def test_an_encoder_with_a_decoder_and_positions_behind_a_padding_index(tmp_path: Path, option: str) -> None:
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    t5.save_pretrained(tmp_path / "t5")
    plain = convert.compress(tmp_path / "t5", tmp_path / "plain", bits=2, effort="fast", fingerprint=lambda _: {})
    done = convert.compress(
        tmp_path / "t5", tmp_path / "out", bits=2, effort="fast", fingerprint=lambda _: {}, **{option: "random"}
    )
    assert _bytes(done.path) != _bytes(plain.path)
    roberta = transformers.RobertaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=18, pad_token_id=1,
    )  # fmt: skip
    assert compress_(transformers.RobertaModel(roberta), effort="fast", **{option: "random"}).seeded


@pytest.mark.parametrize("option", ["calibrate", "allocate"])
def test_models_without_tokens(option: str) -> None:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1])
    with pytest.raises(RbeError, match="does not fit a ResNetModel"):
        compress_(transformers.ResNetModel(config), **{option: "random"})


def test_a_line_without_end_is_not_read_whole() -> None:
    seen = []

    def tokenizer(line: str, verbose: bool) -> dict[str, list[int]]:
        seen.append(len(line))
        return {"input_ids": [1] * len(line.split())}

    batches = list(calibrate.text_tokens(["word " * 1_000_000], tokenizer, context=1024))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(1, 256)] and seen[0] < 100_000
