"""What an unlucky user gives `rbe train`: every case is an error that says what is wrong, and no folder is damaged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rbe.errors import RbeError
from rbe.nn import StreamLinear
from rbe.optim import StreamAdam
from rbe.train import Progress, load, load_config, train
from rbe.train.run import CHECKPOINT, WEIGHTS

Parts = dict[str, np.ndarray]
Write = Callable[..., Path]


def pictures(n: int = 120, side: int = 8, classes: int = 4) -> Parts:
    rng = np.random.default_rng(0)
    sizes = {"train": n, "test": 40}
    x = {f"x_{part}": rng.integers(0, 255, (n, side, side)).astype(np.uint8) for part, n in sizes.items()}
    y = {f"y_{part}": (np.arange(n) % classes).astype(np.uint8) for part, n in sizes.items()}
    return {**x, **y}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write data and a configuration for them."""

    def make(text: str = "", parts: Parts | None = None, name: str = "run") -> Path:
        np.savez(tmp_path / f"{name}.npz", allow_pickle=False, **(parts or pictures()))
        base = f"[data]\npath = '{name}.npz'\nvalidation = 20\n"
        base += "[model]\nwidths = [64, 16, 4]\n" if "[model]" not in text else ""
        base += "[train]\nepochs = 2\nbatch = 25\n" if "[train]" not in text else ""
        path = tmp_path / f"{name}.toml"
        path.write_text(base + text)
        return path

    return make


def test_a_run_that_nothing_would_choose(write: Write) -> None:
    path = write()
    path.write_text(path.read_text().replace("validation = 20", "validation = 0"))
    with pytest.raises(RbeError, match="validation is 0; it must be positive"):
        load_config(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda p: p["y_train"].__setitem__(3, 4), "labels go from 0 to 4.*4 classes"),
        (lambda p: p.update(y_train=p["y_train"].astype(np.float32)), "whole number for every image"),
        (lambda p: p.update(y_test=p["y_test"][:7]), "with 7 labels"),
        (lambda p: p.update(pictures(side=6)), r"images are \(1, 6, 6\), but mlp takes 64 pixels"),
        (lambda p: p.update(x_test=pictures(side=6)["x_test"]), "give one shape"),
    ],
    ids=["label", "labels of floats", "labels too few", "side", "two sides"],
)
def test_data_that_are_not_the_networks(
    write: Write, tmp_path: Path, change: Callable[[Parts], object], error: str
) -> None:
    parts = pictures()
    change(parts)
    with pytest.raises(RbeError, match=error):
        train(load_config(write(parts=parts)), tmp_path / "out")


def test_every_damage_of_the_data_is_told(write: Write, tmp_path: Path) -> None:
    config = load_config(write())
    whole = (tmp_path / "run.npz").read_bytes()
    told = 0
    for k in range(0, len(whole), len(whole) // 40):
        (tmp_path / "run.npz").write_bytes(whole[:k] + bytes([whole[k] ^ 0x55]) + whole[k + 1 :])
        try:
            train(config, tmp_path / f"out{k}")
        except RbeError:
            told += 1
    assert told >= 38  # but for dates and the like, which nobody reads
    (tmp_path / "run.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RbeError, match="fetch it again"):
        train(config, tmp_path / "half")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("name = '../elsewhere'\n", "name of a folder"),
        ("[model]\nwidths = [64, 0, 4]\n", "widths, entry 2, is 0; it must be positive"),
        ("[train]\nbatch = 1\n", "batch norms learn nothing"),
        ("[train]\nseed = 99999999999999999999\n", "63 bits"),
        ("[train]\nthreads = 1000000\n", "at most 1024"),
        ("[train]\nsoftness = inf\n", "softness is inf"),
        ("[seeds]\nspread = inf\n", "spread is inf"),
        ("[seeds]\nbias = 'seed'\n", "bias is 'seed'"),
        ("[seeds]\nblock = 12\n", "block is 12; outer128 has 8, 16, 32, 64"),
        ("[seeds]\nformat = 'dense'\n[[seeds.layer]]\npattern = '*'\nformat = 'outer128'\nblock = 12\n", "block is 12"),
        ("[train]\nmethod = 'sgd'\n", "method is 'sgd'; choose one of tangent"),
        ("[seeds]\nbias = 'false'\n", "give true, false or 'seed'"),
        ("[train]\nlr = 0.0\n", "lr is 0.0; it must be positive"),
        ("[train]\nlr = 1e20\n", "at most 1000"),
        ("[train]\nlatent_lr = -1.0\n", "latent_lr is -1.0"),
        ("[seeds]\nmode = 'faithful'\n", "mode is 'faithful'; packed128 has"),
        ("[seeds]\nformat = 'packed128'\nmode = 'x'\n", "mode is 'x'; packed128 has"),
        ("[model]\nwidths = [64, 99999999, 4]\n", "below 2\\^24"),
        ("[model]\ninner = 0\n", "inner is 0"),
        ("[model]\nvocabulary = 4611686018427387904\n", "vocabulary is"),
        ("name = '..'\n", "name of a folder"),
        ("name = ''\n", "name of a folder"),
        ('name = "a\\u0000b"\n', "name of a folder"),
        ("[seeds]\nrows = [3, 4]\n", "rows is for format stream"),
    ],
)
def test_numbers_that_mean_nothing(write: Write, text: str, error: str) -> None:
    path = write(text)
    if text.startswith("name"):
        path.write_text(text + path.read_text().replace(text, ""))
    with pytest.raises(RbeError, match=error):
        load_config(path)


@pytest.mark.parametrize("text", ["data = 5", "data = true", "a = " + "1" * 5000, "a = " + "[" * 3000 + "]" * 3000])
def test_files_that_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(RbeError, match=r"no TOML|no \[data\] path"):
        load_config(tmp_path / "run.toml")


def test_a_mode_is_for_the_matrices_that_have_one(write: Write, tmp_path: Path) -> None:
    text = (
        "[seeds]\nformat = 'packed128'\nmode = 'faithful'\n[[seeds.layer]]\npattern = 'linear2'\nformat = 'outer128'\n"
    )
    config = load_config(write(text))
    assert [config.seeds.of(f"linear{k}", k).mode for k in (1, 2)] == ["faithful", None]
    assert train(config, tmp_path / "out").epoch


def test_labels_of_one_number(write: Write, tmp_path: Path) -> None:
    parts = pictures()
    parts["y_train"] = np.array(3, np.uint8)
    with pytest.raises(RbeError, match="with 1 labels"):
        train(load_config(write(parts=parts)), tmp_path / "out")


@pytest.mark.parametrize("format", ["outer128", "packed64", "stream"])
def test_a_start_of_other_sides_is_refused_for_every_format(write: Write, tmp_path: Path, format: str) -> None:
    config = load_config(write())
    dense = replace(
        config, seeds=replace(config.seeds, format="dense"), model=replace(config.model, widths=(64, 32, 4))
    )
    train(dense, tmp_path / "dense")
    seeds = replace(config.seeds, format=format, bytes=300 if format == "stream" else 0)
    wrong = replace(config, seeds=seeds, model=replace(config.model, start="dense"))
    with pytest.raises(RbeError, match=r"linear1 is \(16, 64\), .* it is \(32, 64\)"):
        train(wrong, tmp_path / "out")
    if format != "stream":
        only = replace(wrong, model=replace(dense.model, start="dense"), train=replace(config.train, epochs=0))
        with pytest.raises(RbeError, match="random weights would be measured"):
            train(only, tmp_path / "out")


def test_a_last_image_alone_is_left_out(write: Write, tmp_path: Path) -> None:
    """A batch norm has nothing to learn of one image: 101 are trained on, 25 at once."""
    result = train(load_config(write(parts=pictures(121))), tmp_path / "out")
    assert len(result.curve) == 2


def test_bytes_that_are_too_few(write: Write, tmp_path: Path) -> None:
    model = nn.Sequential(StreamLinear(64, 16), StreamLinear(16, 4))
    with pytest.raises(RbeError, match="bytes is 1, but streams without any level take"):
        StreamAdam(model, bytes=1, steps=10)
    text = "[seeds]\nformat = 'outer128'\nbytes = 100\n[[seeds.layer]]\npattern = 'linear1'\nformat = 'dense'\n"
    with pytest.raises(RbeError, match="leaves dense takes 4096"):
        train(load_config(write(text)), tmp_path / "out")


def test_a_teacher_of_other_classes(write: Write, tmp_path: Path) -> None:
    train(
        load_config(write("[model]\nwidths = [64, 16, 5]\n[seeds]\nformat = 'dense'\n", name="five")), tmp_path / "five"
    )
    with pytest.raises(RbeError, match="has 5 classes, this network 4"):
        train(load_config(write("[train]\nepochs = 2\nbatch = 25\nteacher = 'five'\n")), tmp_path / "out")
    four = "[model]\nwidths = [36, 16, 4]\n[seeds]\nformat = 'dense'\n"
    train(load_config(write(four, pictures(side=6), name="six")), tmp_path / "six")
    with pytest.raises(RbeError, match="does not take the inputs"):
        train(load_config(write("[train]\nepochs = 2\nbatch = 25\nteacher = 'six'\n")), tmp_path / "out")


def stopped(config: Path, out: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(load_config(config), out, stop)


def test_checkpoints_that_are_damaged_or_of_other_data(write: Write, tmp_path: Path) -> None:
    path, out = write(), tmp_path / "out"
    stopped(path, out)
    whole = (out / CHECKPOINT).read_bytes()
    saved = torch.load(out / CHECKPOINT, weights_only=True)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b""):
        (out / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(RbeError, match="damaged"):
            train(load_config(path), out)
    for lacking in ("model", "optimizer", "history", "torch"):
        torch.save({k: v for k, v in saved.items() if k != lacking}, out / CHECKPOINT)
        with pytest.raises(RbeError, match="does not fit this run"):
            train(load_config(path), out)
    (out / CHECKPOINT).write_bytes(whole)
    write(parts=pictures(160))
    with pytest.raises(RbeError, match="140 examples to train on, and were 100"):
        train(load_config(path), out)
    write()
    assert train(load_config(path), out).curve == train(replace(load_config(path)), tmp_path / "whole").curve


def test_a_trained_network_that_is_damaged(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(load_config(write()), out)
    whole = (out / WEIGHTS).read_bytes()
    for k in range(0, len(whole), len(whole) // 60):
        (out / WEIGHTS).write_bytes(whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :])
        with pytest.raises(RbeError, match="damaged"):
            load(out)
    (out / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(RbeError, match="damaged"):
        load(out)
