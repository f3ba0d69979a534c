"""A small problem for training runs."""

import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from run_cases import Write

from rbe.train import Config
from rbe.train.config import Data, Model, Recipe, Seeds


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a small problem, four classes of bright quadrants, and a configuration for it."""
    rng = np.random.default_rng(0)

    def images(n: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, 4, n)
        x = rng.integers(0, 120, (n, side, side))
        half = side // 2
        for k in range(n):
            x[k, half * (y[k] // 2) :, half * (y[k] % 2) :][:half, :half] += 90
        return x.astype(np.uint8), y.astype(np.uint8)

    def make(text: str = "", side: int = 8) -> Path:
        parts = [*images(600, side), *images(200, side)]
        np.savez(tmp_path / "data.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), parts, strict=True)))
        path = tmp_path / "run.toml"
        base = "[data]\npath = 'data.npz'\nvalidation = 100\n"
        base += f"[model]\nwidths = [{side * side}, 32, 4]\n" if "[model]" not in text else ""
        path.write_text(base + text)
        return path

    return make


@pytest.fixture
def pairs(tmp_path: Path) -> Config:
    """Numbers in two languages, each four times."""
    rng = random.Random(0)
    german = ["null", "eins", "zwei", "drei", "vier"]
    english = ["zero", "one", "two", "three", "four"]
    for part, count in (("train", 400), ("val", 30), ("test_2016_flickr", 30)):
        drawn = [[rng.randrange(5)] * 4 for _ in range(count)]
        for side, words in (("de", german), ("en", english)):
            text = "".join(" ".join(words[k] for k in line) + "\n" for line in drawn)
            (tmp_path / f"{part}.{side}.txt").write_text(text)
    model = Model("transformer", vocabulary=285, layers=1, size=32, heads=2, inner=64)
    recipe = Recipe(epochs=4, batch=10, lr=5e-3, smoothing=0.1)
    return Config("pairs", Data(".", "translation"), model, Seeds(block=8), recipe, tmp_path)


@pytest.fixture
def characters(tmp_path: Path) -> Config:
    """A text whose next character is certain after the first of each word."""
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choice(["abcd", "ecfg"]) for _ in range(800)))
    model = Model("lstm", vocabulary=8, size=32, dropout=0.1)
    recipe = Recipe(epochs=4, batch=8, lr=2e-2, clip=1.0)
    return Config("text", Data("text.txt", "characters", length=20), model, Seeds(block=8), recipe, tmp_path)


@pytest.fixture
def language(tmp_path: Path) -> Config:
    """Lines of a small grammar, and a tokenizer for them."""
    rng = random.Random(0)
    for part, count in (("train", 300), ("valid", 40), ("test", 40)):
        lines = (f"the {rng.choice(['cat', 'dog'])} sees the {rng.choice(['tree', 'moon'])}\n" for _ in range(count))
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False)
    tokenizer.train([str(tmp_path / "train.txt")], trainer)
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    model = Model("gpt", vocabulary=7, layers=2, size=32, heads=2, inner=128)
    data = Data(".", "language", length=16, tokenizer="words")
    return Config("gpt", data, model, Seeds(block=8), Recipe(epochs=6, batch=8, lr=2e-2), tmp_path)
