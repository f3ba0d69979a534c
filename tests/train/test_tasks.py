"""Every task end to end on a small problem, dense and in seeds, and what it refuses."""

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from run_cases import Stopped

from rbe.errors import RbeError
from rbe.nn import Seeded, Stream
from rbe.train import Config, Result, load, load_config, train
from rbe.train.config import Layer, Seeds
from rbe.train.data import flipped
from rbe.train.data import load as load_images
from rbe.train.language import adopt
from rbe.train.networks import build, sizes
from rbe.train.run import TASKS
from rbe.train.texts import Gpt

Make = Callable[[], Config]


@pytest.fixture
def streams(tmp_path: Path) -> Config:
    """Sorted JPEG images of two colours; two convolutional stages have seeds, the classifier has smaller ones."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 0, 1], [50, 50, 10, 10]).astype(np.uint8)  # a sixth is the test set
    parts = []
    for label in labels:
        image = rng.integers(0, 80, (16, 16, 3))
        image[..., label] += 150
        out = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(out, "JPEG", quality=90)
        parts.append(np.frombuffer(out.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, parts)])
    np.savez(tmp_path / "streams.npz", data=np.concatenate(parts), offsets=offsets, labels=labels)
    path = tmp_path / "run.toml"
    path.write_text(
        "[data]\npath = 'streams.npz'\nvalidation = 20\nshift = 1\nflip = true\n[model]\nkind = 'resnet20'\n"
        "[train]\nepochs = 3\nbatch = 20\n[[seeds.layer]]\npattern = 'conv'\nformat = 'dense'\n"
        "[[seeds.layer]]\npattern = 'linear'\nblock = 8\n"
    )
    return load_config(path)


def test_shrunk_images_are_means_of_squares(streams: Config) -> None:
    whole, half = load_images(streams), load_images(replace(streams, data=replace(streams.data, shrink=2)))
    for part in ("train", "validation", "test"):
        given, made = getattr(whole, part)[0], getattr(half, part)[0]
        means = given.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
        # Both are normalised, so one is a factor and a shift of the other.
        torch.testing.assert_close(
            (made - made.mean()) / made.std(), (means - means.mean()) / means.std(), atol=1e-4, rtol=1e-4
        )
    with pytest.raises(RbeError, match=r"shrink is 3, but images .* 16x16 pixels; give a divisor"):
        load_images(replace(streams, data=replace(streams.data, shrink=3)))


def test_streams_are_shuffled_for_training_only(streams: Config) -> None:
    images = load_images(streams)
    assert images.train[0].shape == (80, 3, 16, 16)
    assert 0 < images.validation[1].float().mean() < 1  # sorted, all would be 1
    assert images.test[1].tolist() == [0] * 10 + [1] * 10
    assert (images.test[0][:10, 0].mean() > images.test[0][:10, 1].mean()).item()
    again = load_images(streams)
    assert torch.equal(images.train[0], again.train[0])


def test_a_residual_network_learns_and_counts_by_layer(streams: Config, tmp_path: Path) -> None:
    model = build(streams)
    kinds = [m.spec.block for m in model.modules() if isinstance(m, Seeded)]
    assert kinds == [16] * 18 + [8]
    shapes = [(16, 144)] * 6 + [(32, 144)] + [(32, 288)] * 5 + [(64, 288)] + [(64, 576)] * 5
    seeds = sum(-(-r // 16) * -(-c // 16) for r, c in shapes) * 16 + 2 * 8 * 16
    assert sizes(model)["seed_bytes"] == seeds + 4 * 27 * 16
    assert sizes(model)["weights"] == sum(r * c for r, c in shapes) + 27 * 16 + 640
    result = train(streams, tmp_path / "out")
    assert result.accuracy > 0.8
    assert load(tmp_path / "out")(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_a_residual_network_of_streams_learns(streams: Config, tmp_path: Path) -> None:
    config = replace(streams, seeds=Seeds("stream", bytes=30_000, layer=(Layer("conv", format="dense"),)))
    model = build(config)
    found = [m for m in model.modules() if isinstance(m, Stream)]
    assert len(found) == 19
    assert [m.cells for m in found] == [9] * 18 + [1]
    assert all(m.open_shape == m.shape and not m.slim for m in found)
    result = train(config, tmp_path / "out")
    assert result.accuracy > 0.8
    assert result.seed_bytes <= 30_000 + 4 * 27 * 16
    assert load(tmp_path / "out")(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_half_of_the_images_are_mirrored() -> None:
    x = torch.arange(3.0).expand(100, 1, 2, 3)
    y = flipped(x, torch.Generator().manual_seed(0))
    turned = (y == x.flip(-1)).flatten(1).all(1)
    assert ((y == x).flatten(1).all(1) ^ turned).all()
    assert 30 < turned.sum() < 70


@pytest.mark.parametrize("format", ["outer128", "stream", "dense"])
def test_characters(characters: Config, tmp_path: Path, format: str) -> None:
    made = Seeds("stream", bytes=2000) if format == "stream" else replace(characters.seeds, format=format)
    rates = {"lr": 5e-2, "dense_lr": 1e-2} if format == "stream" else {}
    config = replace(characters, seeds=made, train=replace(characters.train, **rates))
    result = train(config, tmp_path / "out")
    # One bit a word of five characters is all there is; guessing by frequency is 2.9 bits a character.
    assert 0.2 < result.value < 1.0
    assert result.metric == "bits_per_character"
    assert result.to_json()["bits_per_character"] == result.value
    assert result.validation == min(result.curve)  # less is better
    names = [name for name, m in load(tmp_path / "out").named_modules() if isinstance(m, Seeded | Stream)]
    wanted = ["embed", *(f"lstm.{side}_l{k}" for k in (0, 1) for side in ("ih", "hh")), "linear"]
    assert names == (wanted if format != "dense" else [])
    assert format != "stream" or result.bytes == result.seed_bytes + 4 * len(names) <= 2000 + 24


def test_an_interrupted_text_ends_as_if_nothing_had_happened(characters: Config, tmp_path: Path) -> None:
    config = replace(characters, train=replace(characters.train, epochs=2), seeds=replace(characters.seeds, bytes=6000))

    def stop(p: object) -> None:
        raise Stopped

    whole = train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "part", stop)
    assert replace(train(config, tmp_path / "part"), seconds=0) == replace(whole, seconds=0)
    one, two = load(tmp_path / "whole").state_dict(), load(tmp_path / "part").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert train(config, tmp_path / "part").plan == whole.plan
    assert 4000 < whole.seed_bytes <= 6000


def test_a_text_is_distilled_and_streams_start_at_the_teacher(characters: Config, tmp_path: Path) -> None:
    dense = replace(characters, seeds=Seeds("dense"))
    taught = train(dense, tmp_path / "teacher")
    close = replace(characters, seeds=Seeds("stream", bytes=99_999, spread=0.02))
    close = replace(close, model=replace(close.model, start="teacher"), train=replace(close.train, epochs=0))
    # Both biases of torch's layer are in the one of a stream.
    assert train(close, tmp_path / "close").value == pytest.approx(taught.value, rel=0.02)
    student = replace(characters, train=replace(characters.train, teacher="teacher", weight=1.0, softness=1.0))
    assert train(student, tmp_path / "out").value < 1.0


@pytest.mark.parametrize("format", ["outer128", "stream", "dense"])
def test_language(language: Config, tmp_path: Path, format: str) -> None:
    made = Seeds("stream", bytes=3000) if format == "stream" else replace(language.seeds, format=format)
    rate, epochs = {"outer128": (1e-2, 6), "stream": (5e-2, 12), "dense": (5e-3, 6)}[format]
    config = replace(language, seeds=made, train=replace(language.train, lr=rate, epochs=epochs))
    result = train(config, tmp_path / "out")
    # Two of five words have two choices: 2^(2/5) = 1.32 is the least; guessing is 7.
    assert 1.2 < result.value < (2.3 if format != "dense" else 1.6)
    names = [name for name, m in load(tmp_path / "out").named_modules() if isinstance(m, Seeded | Stream)]
    assert len(names) == (2 + 2 * 4 if format != "dense" else 0)


def test_a_model_of_transformers_is_measured_and_teaches(language: Config, tmp_path: Path) -> None:
    shape = transformers.GPT2Config(vocab_size=7, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    given = transformers.GPT2LMHeadModel(shape).eval()
    for p in given.parameters():
        p.data.add_(0.1 * torch.randn(p.shape))  # biases and norms too
    given.save_pretrained(tmp_path / "given")
    model = Gpt(language).eval()
    adopt(model, tmp_path / "given")
    x = torch.tensor([[1, 2, 3, 4, 5]])
    torch.testing.assert_close(model(x), given(x).logits, rtol=1e-4, atol=1e-4)
    config = replace(language, seeds=Seeds("dense"), model=replace(language.model, start="given"))
    config = replace(config, train=replace(config.train, epochs=0))
    result = train(config, tmp_path / "measured")
    assert result.epoch == 0
    assert result.ratio == 1.0
    assert torch.equal(load(tmp_path / "measured").embed.weight, given.transformer.wte.weight)
    (tmp_path / "given" / "result.json").write_text('{"perplexity": 7.0}')  # no run of ours
    student = replace(language, train=replace(language.train, epochs=1, teacher="given", steps=2))
    assert isinstance(train(student, tmp_path / "student"), Result)
    close = replace(config, seeds=Seeds("stream", bytes=99_999, spread=0.05))
    near = train(close, tmp_path / "near")  # starts at the given model, of which it is a fine rounding
    assert near.value == pytest.approx(result.value, rel=0.01)
    assert torch.equal(load(tmp_path / "near").norm.weight, given.transformer.ln_f.weight)
    with pytest.raises(RbeError, match="cannot be read"):
        train(replace(student, train=replace(student.train, teacher=".")), tmp_path / "other")
    wrong = replace(config, model=replace(config.model, size=16))
    with pytest.raises(RbeError, match="use its shape"):
        train(wrong, tmp_path / "wrong")
    wrong = replace(config, model=replace(config.model, layers=1))
    with pytest.raises(RbeError, match="has a matrix blocks"):
        train(wrong, tmp_path / "wrong")
    wrong = replace(config, model=replace(config.model, heads=4))
    with pytest.raises(RbeError, match="2 heads, here 4"):
        train(wrong, tmp_path / "wrong")
    small = replace(student.model, size=16, heads=4, layers=1, inner=24)  # than its teacher
    assert isinstance(train(replace(student, model=small), tmp_path / "small"), Result)
    short = replace(config, data=replace(config.data, length=8))  # than the places of the given model
    assert train(short, tmp_path / "short").value == pytest.approx(result.value, rel=0.2)
    assert load(tmp_path / "short").place.weight.shape == (8, 32)
    for key, value, message in (
        ("n_embd", None, "cannot be read"),
        ("n_embd", 0, "no GPT-2 model"),
        ("n_embd", 31.9, "n_embd is 31.9"),
        ("n_embd", 10**30, "no GPT-2 model"),
        ("n_layer", True, "n_layer is True"),
        ("n_layer", 1, "has a layer 1, which its config.json does not count"),
        ("n_head", 5, "no GPT-2 model"),
        ("model_type", "gptj", "only gpt2 is computed"),
        ("activation_function", "relu", "only gelu_new or gelu_pytorch_tanh is computed"),
        ("layer_norm_epsilon", 1e-3, "only 1e-05"),
        ("tie_word_embeddings", False, "only True"),
        ("scale_attn_weights", False, "only True"),
        ("scale_attn_by_inverse_layer_idx", True, "only False"),
        ("n_embd", 16, "here it is"),
    ):
        about = json.loads((tmp_path / "given" / "config.json").read_bytes())
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "given" / "model.safetensors", tmp_path / "other")
        (tmp_path / "other" / "config.json").write_text(json.dumps({**about, key: value}))
        with pytest.raises(RbeError, match=message):
            train(replace(student, train=replace(student.train, teacher="other")), tmp_path / "out")
    given.transformer.ln_f.weight.data[3] = math.nan
    given.save_pretrained(tmp_path / "broken")
    with pytest.raises(RbeError, match="not finite; fetch the model again"):
        train(replace(student, train=replace(student.train, teacher="broken")), tmp_path / "out")
    (tmp_path / "other" / "config.json").write_text("[" * 5000)
    with pytest.raises(RbeError, match="cannot be read"):
        train(replace(student, train=replace(student.train, teacher="other")), tmp_path / "out")


def test_what_networks_of_characters_take_is_told(characters: Config) -> None:
    task = TASKS["characters"](characters)
    assert "".join(sorted(set((characters.folder / characters.data.path).read_text()))) == task.inputs["symbols"]


def test_a_start_that_read_other_symbols_is_refused(characters: Config, language: Config, tmp_path: Path) -> None:
    for config in (characters, language):
        short = replace(config, seeds=Seeds("dense"), train=replace(config.train, epochs=1, steps=1))
        train(short, tmp_path / "before")
        taught = replace(short, train=replace(short.train, teacher="before"))
        assert isinstance(train(taught, tmp_path / "same"), Result)
        if config is characters:
            text = (tmp_path / "text.txt").read_text()
            (tmp_path / "text.txt").write_text(text.replace("g", "h"))
        else:
            # The folder of the run serves as one of a tokenizer.
            own = json.loads((tmp_path / "before" / "tokenizer.json").read_text())
            numbers = own["model"]["vocab"]
            numbers["cat"], numbers["dog"] = numbers["dog"], numbers["cat"]
            (tmp_path / "turned").mkdir()
            (tmp_path / "turned" / "tokenizer.json").write_text(json.dumps(own))
            assert isinstance(
                train(replace(taught, data=replace(taught.data, tokenizer="before")), tmp_path / "x"), Result
            )
            taught = replace(taught, data=replace(taught.data, tokenizer="turned"))
        with pytest.raises(RbeError, match="the network in before reads other symbols"):
            train(taught, tmp_path / "other")
        shutil.rmtree(tmp_path / "before")
        shutil.rmtree(tmp_path / "same")


def test_what_the_data_does_not_fit(
    characters: Config, pairs: Config, language: Config, streams: Config, tmp_path: Path
) -> None:
    for config in (characters, language):
        wrong = replace(config, model=replace(config.model, vocabulary=9))
        with pytest.raises(RbeError, match="set it to"):
            TASKS[config.data.task](wrong)
    with pytest.raises(RbeError, match="shorten"):
        TASKS["language"](replace(language, data=replace(language.data, length=10_000)))
    with pytest.raises(RbeError, match="shorter"):
        TASKS["characters"](replace(characters, data=replace(characters.data, length=100_000)))
    with pytest.raises(RbeError, match="raise"):
        TASKS["translation"](replace(pairs, data=replace(pairs.data, length=2)))
    with pytest.raises(RbeError, match="no finished run"):
        train(replace(characters, model=replace(characters.model, start="x")), tmp_path / "out")
    (tmp_path / "val.en.txt").write_text("one\n")
    with pytest.raises(RbeError, match="give pairs"):
        TASKS["translation"](pairs)
    (tmp_path / "words" / "tokenizer.json").write_text("{")
    with pytest.raises(RbeError, match="tokenizer"):
        TASKS["language"](language)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RbeError, match="as text"):
        TASKS["characters"](characters)
    with np.load(tmp_path / "streams.npz") as file:
        np.savez(tmp_path / "streams.npz", data=file["data"][:-1], offsets=file["offsets"], labels=file["labels"])
    with pytest.raises(RbeError, match="do not cut"):
        load_images(streams)
    assert not (tmp_path / "out").exists()
