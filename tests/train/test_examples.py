"""The configurations of examples/: every one can be read, and has the bytes and the ratio that it says."""

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from rbe.train import load_config
from rbe.train.networks import build, dense, sizes
from rbe.train.planting import matrices

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "weights", "seed_bytes"),
    [
        ("mnist-dense", 234752, 939008),
        ("mnist-64", 234752, 14720),
        ("mnist-256", 234752, 3840),
        ("fashion-64", 234752, 14720),
        ("cifar-mlp-64", 820480, 51328),
        ("resnet20-64", 268336, 17088),
        ("lenet5-fc-300", 430500, 4 * (430500 - 400_000) + 4992),
        ("lstm-180", 4260864, 87040),
        ("multi30k", 7553024, 4 * 8000 * 256 + 95232),
    ],
)
def test_the_examples_have_the_bytes_they_say(name: str, weights: int, seed_bytes: int) -> None:
    model = build(load_config(EXAMPLES / f"{name}.toml"))
    assert sizes(model)["weights"] == weights
    assert sizes(model)["seed_bytes"] == seed_bytes


@pytest.mark.parametrize(
    ("name", "pattern", "ratio"),
    [
        ("lstm-180-stream", "lstm.*", 180),
        ("resnet20-64-stream", "*", 64),
        ("resnet20x4-150-stream", "*", 145),  # at most; it says what it ended at
        ("multi30k-stream", "*.attention.*", 200),
        ("multi30k-stream", "*er", 250),
        ("gpt-200-stream", "*", 200),
    ],
)
def test_the_examples_of_streams_have_the_ratio_they_say(name: str, pattern: str, ratio: int) -> None:
    config = load_config(EXAMPLES / f"{name}.toml")
    found = [m for m in matrices(dense(config)) if fnmatchcase(m.name, pattern)]
    allowed = config.seeds.budget(found[0].name)
    together = [m for m in matrices(dense(config)) if config.seeds.budget(m.name) == allowed]
    together = [m for m in together if config.seeds.of(m.name, 0).format == "stream"]
    assert {m.name for m in found} <= {m.name for m in together}
    weights = sum(m.weight.numel() for m in (found if name.startswith("lstm") else together))
    assert ratio <= 4 * weights / allowed[1] < 1.01 * ratio


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_is_a_configuration(path: Path) -> None:
    config = load_config(path)
    assert config.train.epochs or config.model.start
    if config.train.teacher is not None and "runs" in config.train.teacher:
        taught_by = load_config(EXAMPLES / f"{Path(config.train.teacher).name}.toml")
        assert taught_by.seeds.format == "dense"
        # A student may do without the norms of its teacher.
        alike = {"dropout": 0.0, "norm": "batch", "start": None}
        assert replace(taught_by.model, **alike) == replace(config.model, **alike)
        # Only that a student may be chosen on more sentences.
        assert replace(taught_by.data, validation=config.data.validation) == config.data
        if config.model.start is not None:
            assert config.model.start == config.train.teacher
