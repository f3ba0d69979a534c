"""Training runs from a configuration: what they refuse, that they learn, resume exactly and count every byte."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import QUICK, STREAM, Stopped, Write
from torch import nn

import rbe
from rbe import checkpoint
from rbe.cli import learn, work
from rbe.errors import RbeError
from rbe.nn import Seeded, StreamLinear
from rbe.optim import HybridAdam
from rbe.train import Config, Epoch, Progress, Result, data, load, load_config, train
from rbe.train.data import shifted
from rbe.train.networks import build, sizes
from rbe.train.run import CHECKPOINT, RESULT, accuracy


@pytest.mark.parametrize("seeds", ["", "[seeds]\nformat = 'packed128'\n", "[seeds]\nformat = 'dense'\n", STREAM])
def test_products_in_bfloat16_train_parameters_in_float32(write: Write, tmp_path: Path, seeds: str) -> None:
    exact = load_config(write(seeds if seeds == STREAM else seeds + QUICK.replace("flip_every = 4\n", "")))
    config = replace(exact, train=replace(exact.train, dtype="bfloat16"))
    result, other = train(config, tmp_path / "out"), train(exact, tmp_path / "exact")
    assert result.accuracy > 0.6
    stored = load(tmp_path / "out").state_dict()
    assert all(tensor.dtype != torch.bfloat16 for tensor in stored.values())
    changed = any(not torch.equal(t, stored[name]) for name, t in load(tmp_path / "exact").state_dict().items())
    assert changed == ("dense" in seeds or seeds == STREAM)  # blocks are multiplied in float32
    # Runs of before there was a choice are still the same runs.
    assert "dtype" not in exact.to_json()["train"] and Config.from_json(config.to_json()).train.dtype == "bfloat16"
    assert result.seed_bytes <= 90 if seeds == STREAM else result.seed_bytes == other.seed_bytes


def test_a_network_of_streams_keeps_to_its_bytes_and_goes_on_where_it_stopped(write: Write, tmp_path: Path) -> None:
    config = load_config(write(STREAM))
    result = train(config, tmp_path / "out")
    assert result.accuracy > 0.6
    assert result.seed_bytes <= 90
    assert result.bytes == result.seed_bytes + 2 * 4  # a scale for every matrix; the biases are in the streams
    assert result.weights == 64 * 32 + 32 * 4
    assert sizes(load(tmp_path / "out"))["bytes"] == result.bytes

    def stop(progress: Progress) -> None:
        if progress.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "again", stop)
    again = train(config, tmp_path / "again")
    assert (again.curve, again.seed_bytes, again.value) == (result.curve, result.seed_bytes, result.value)


def test_streams_and_dense_matrices_stand_side_by_side(write: Write, tmp_path: Path) -> None:
    text = STREAM.replace("bytes = 90\n", "bytes = 70\n").replace("[64, 32, 4]\nnorm = 'none'", "[64, 32, 16, 8, 4]")
    text += "[[seeds.layer]]\npattern = 'linear2'\nformat = 'dense'\n"
    text += "[[seeds.layer]]\npattern = 'linear[34]'\nbytes = 40\n"
    result = train(load_config(write(text)), tmp_path / "out")
    model = load(tmp_path / "out")
    layers = [model.get_submodule(f"linear{k}") for k in (1, 2, 3, 4)]
    assert [type(layer) for layer in layers] == [StreamLinear, nn.Linear, StreamLinear, StreamLinear]
    first, _, third, fourth = layers
    assert (len(first.seed) <= 70, len(third.seed) + len(fourth.seed) <= 40) == (True, True)
    seeds = len(first.seed) + len(third.seed) + len(fourth.seed)
    assert result.seed_bytes == seeds + 4 * 32 * 16
    assert result.bytes == result.seed_bytes + 3 * 4 + 4 * 16 + 4 * 4 * (32 + 16 + 8)  # scales, a bias, norms
    assert result.accuracy > 0.6


def test_a_chain_knows_its_cells_and_a_narrow_layer_stands_before_norms(write: Write, tmp_path: Path) -> None:
    text = STREAM.replace("norm = 'none'\n", "").replace("bytes = 90", "bytes = 90\nrows = [16, 4]")
    config = load_config(write(text))
    first, second = build(config).linear1, build(config).linear2
    assert (first.cells, first.open_shape, second.cells, second.open_shape) == (8, (16, 64), 1, (4, 16))
    assert not first.slim
    train(config, tmp_path / "out")
    bare = build(load_config(write(text.replace("[seeds]", "norm = 'none'\n[seeds]")))).linear1
    assert bare.slim


def test_a_network_of_streams_starts_at_a_dense_one(write: Write, tmp_path: Path) -> None:
    path = write("[seeds]\nformat = 'dense'\n[train]\nepochs = 3\nbatch = 50\nlr = 0.01\n")
    dense = train(load_config(path), tmp_path / "dense")
    text = "[model]\nwidths = [64, 32, 4]\nstart = 'dense'\n[seeds]\nformat = 'stream'\nbytes = 5000\nspread = 0.1\n"
    config = load_config(write(text + "[train]\nepochs = 0\n"))
    result = train(config, tmp_path / "out")
    assert result.value == pytest.approx(dense.value, abs=0.02)
    given, made = load(tmp_path / "dense"), load(tmp_path / "out")
    torch.testing.assert_close(made.norm1.weight, given.norm1.weight, rtol=0, atol=0)
    torch.testing.assert_close(made.linear1.weight, given.linear1.weight, rtol=0, atol=0.02)
    with pytest.raises(RbeError, match="has a norm norm1"):
        train(replace(config, model=replace(config.model, norm="none")), tmp_path / "bare")
    with pytest.raises(RbeError, match=r"linear1 is \(16, 64\)"):
        train(replace(config, model=replace(config.model, widths=(64, 16, 4))), tmp_path / "small")
    with pytest.raises(RbeError, match=r"has seeds, in linear1; name the run of a dense network"):
        train(replace(config, model=replace(config.model, start="out")), tmp_path / "again")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STREAM.replace("bytes = 90", ""), "bytes is missing"),
        (STREAM.replace("bytes = 90", "bytes = 90\nrows = [4]"), "2 positive numbers"),
        (STREAM + "flip_every = 4\n", "no meaning"),
        (STREAM + "weight_decay = 0.1\npull = 0.1\n", "weight_decay, pull have no meaning"),
        (STREAM + "[[seeds.layer]]\npattern = 'linear1'\nformat = 'outer128'\n", "outer128 cannot stand beside"),
        (STREAM + "[[seeds.layer]]\npattern = 'linear1'\nbytes = 0\n", "positive number"),
        (STREAM + "[[seeds.layer]]\npattern = 'linear1'\nformat = 'dense'\nbytes = 9\n", "of format stream"),
        (STREAM.replace("bytes = 90", "bytes = 90\nrows = [4, 4]\n[[seeds.layer]]\npattern = '*1'\n"), "rows"),
    ],
)
def test_what_means_nothing_for_streams_is_refused(write: Write, text: str, message: str) -> None:
    with pytest.raises(RbeError, match=message):
        load_config(write(text))


@pytest.mark.parametrize("format", ["outer128", "packed128", "packed64", "dense"])
def test_a_network_of_every_format_learns(write: Write, tmp_path: Path, format: str) -> None:
    text = QUICK.replace("flip_every = 4", "flip_every = 0") if format in ("packed64", "dense") else QUICK
    config = load_config(write(f"[seeds]\nformat = '{format}'\nblock = 8\n{text}"))
    result = train(config, tmp_path / "out")
    # One number for 64 weights leaves packed64 little to say; guessing is 0.25.
    assert result.accuracy > (0.4 if format == "packed64" else 0.6)
    assert len(result.curve) == 4
    assert result.weights == 64 * 32 + 32 * 4
    again = load(tmp_path / "out")
    assert all(not m.trainable for m in again.modules() if isinstance(m, Seeded))
    assert sizes(again)["bytes"] == result.bytes


def test_bytes_are_counted_whole(write: Write) -> None:
    config = load_config(write("[seeds]\nformat = 'outer128'\nblock = 16\n"))
    model = build(config)
    seeds = 16 * (4 * 2 + 2 * 1)
    rest = 4 * (2 + 32 + 4 + 4 * 32)  # scales, biases, and four vectors of the norm
    assert sizes(model) == {"weights": 64 * 32 + 32 * 4, "seed_bytes": seeds, "bytes": seeds + rest}
    for module in model.modules():
        if isinstance(module, Seeded):
            module.freeze()
    assert sizes(model)["bytes"] == seeds + rest


@pytest.mark.parametrize(("bits", "each"), [(16, 2), (8, 1)])
def test_the_rest_can_be_small(write: Write, tmp_path: Path, bits: int, each: int) -> None:
    config = load_config(write(QUICK + f"rest_bits = {bits}\n"))
    result = train(config, tmp_path / "out")
    vectors = 32 + 32 + 4  # row scales and bias of the first layer, bias of the second
    steps = 4 * 3 if bits == 8 else 0
    assert result.bytes == result.seed_bytes + 4 * 2 + each * vectors + steps
    assert result.accuracy > 0.6
    images = data.load(config)
    again = load(tmp_path / "out")
    assert accuracy(again, *images.test) == result.accuracy
    assert accuracy(again, *images.validation) == result.validation


@pytest.mark.parametrize(("bits", "each"), [(16, 2), (8, 1)])
def test_the_rest_of_streams_can_be_small(write: Write, tmp_path: Path, bits: int, each: int) -> None:
    # Norms stay, but for their counter: gains, shifts, means and variances of 32 units.
    text = STREAM.replace("norm = 'none'\n", "") + f"rest_bits = {bits}\n"
    config = load_config(write(text))
    result = train(config, tmp_path / "out")
    steps, fine = (4 * 2, 2) if bits == 8 else (0, each)
    assert result.bytes == result.seed_bytes + 4 * 2 + 32 * (2 * each + 2 * fine) + steps
    again, images = load(tmp_path / "out"), data.load(config)
    assert accuracy(again, *images.test) == result.accuracy
    assert accuracy(again, *images.validation) == result.validation


@pytest.mark.parametrize("most", ["outer128", "dense"])
def test_the_rest_is_counted_as_it_is_stored_where_some_matrices_are_dense(
    write: Write, tmp_path: Path, most: str
) -> None:
    other = {"outer128": "dense", "dense": "outer128"}[most]
    text = f"[seeds]\nformat = '{most}'\nblock = 8\n[[seeds.layer]]\npattern = 'linear1'\nformat = '{other}'\n"
    config = load_config(write(text + "[train]\nepochs = 2\nbatch = 50\nrest_bits = 16\n"))
    result = train(config, tmp_path / "out")
    model = load(tmp_path / "out")
    dense = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    seeds = sum(8 * m.seeds.numel() for m in model.modules() if isinstance(m, Seeded))
    assert dense
    assert seeds
    assert result.seed_bytes == seeds + 2 * dense
    assert {(p.pattern, p.format, p.bytes) for p in result.parts} == {
        ("linear1" if other == "outer128" else "", "outer128", seeds),
        ("linear1" if other == "dense" else "", "dense", 2 * dense),
    }
    assert sum(p.weights for p in result.parts) == result.weights
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert result.bytes > result.seed_bytes
    assert result.ratio == 4 * result.weights / result.seed_bytes


def test_three_phases_leave_signs_alone_at_both_ends(write: Write, tmp_path: Path) -> None:
    config = load_config(write("[train]\nepochs = 10\nbatch = 50\nlr = 0.05\nflip_every = 3\nphases = 'three'\n"))
    history: list[Epoch] = []
    train(config, tmp_path / "out", lambda p: history.append(p.history[-1]))
    turned = [epoch.turned for epoch in history]
    assert turned[0] > 0  # the first phase is half an epoch
    assert turned[6] > turned[1]
    assert turned[7] == turned[8] == turned[9]  # from three quarters on only points move
    assert [epoch.rates["latent"] > 0 for epoch in history[:8]] == [True] * 7 + [False]
    assert all(epoch.rates["point"] > 0 for epoch in history)


def test_rounds_hold_ever_more_signs_and_go_on_where_they_stopped(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[float] = []
    hold = HybridAdam.hold

    def watched(self: HybridAdam, share: float) -> int:
        held.append(share)
        return hold(self, share)

    monkeypatch.setattr(HybridAdam, "hold", watched)
    text = "[train]\nepochs = 6\nbatch = 50\nlr = 0.05\nflip_every = 3\nphases = 'rounds'\n"
    config = load_config(write(text))
    history: list[Epoch] = []
    whole = train(config, tmp_path / "whole", lambda p: history.append(p.history[-1]))
    assert held == [0.5, 0.75, 0.9, 1.0]
    assert history[2].turned != history[3].turned

    def stop(p: Progress) -> None:
        if p.epoch in (1, 4):
            raise Stopped

    for _ in range(2):
        with pytest.raises(Stopped):
            train(config, tmp_path / "part", stop)
    assert replace(train(config, tmp_path / "part"), seconds=0) == replace(whole, seconds=0)


def test_beams_change_fields_of_packed128(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: list[int] = []
    beam = HybridAdam.beam

    def watched(self: HybridAdam, *args: Any, **options: Any) -> Any:
        outcome = beam(self, *args, **options)
        accepted.append(outcome.accepted)
        return outcome

    monkeypatch.setattr(HybridAdam, "beam", watched)
    text = "[seeds]\nformat = 'packed128'\nblock = 8\n[train]\nepochs = 2\nbatch = 50\nlr = 0.02\n"
    train(load_config(write(text + "beam_every = 4\nbeam_share = 0.3\n")), tmp_path / "out")
    assert len(accepted) == 4  # at steps 0, 4, 8 and 12 of 20; the last quarter has none
    assert sum(accepted) > 0


def test_a_folder_of_another_run_is_not_touched(write: Write, tmp_path: Path) -> None:
    config = load_config(write(QUICK))
    train(config, tmp_path / "out")
    before = (tmp_path / "out" / RESULT).read_text()
    other = replace(config, train=replace(config.train, seed=1, epochs=1))
    with pytest.raises(RbeError, match="another run"):
        train(other, tmp_path / "out")
    assert (tmp_path / "out" / RESULT).read_text() == before
    train(other, tmp_path / "out", restart=True)
    assert json.loads((tmp_path / "out" / RESULT).read_text())["config"]["train"]["seed"] == 1
    (tmp_path / "out" / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(RbeError, match="damaged"):
        train(config, tmp_path / "out")


def test_a_teacher_is_learned_from(write: Write, tmp_path: Path) -> None:
    path = write(QUICK)
    dense = load_config(path)
    dense = replace(dense, seeds=replace(dense.seeds, format="dense"), train=replace(dense.train, flip_every=0))
    train(dense, tmp_path / "teacher")
    student = load_config(path)
    student = replace(student, train=replace(student.train, teacher="teacher", weight=1.0))
    assert train(student, tmp_path / "out").accuracy > 0.6  # from the teacher's outputs alone
    lost = replace(student, train=replace(student.train, teacher="nowhere"))
    with pytest.raises(RbeError, match="no finished run"):
        train(lost, tmp_path / "other")


def test_patience_ends_a_run_and_the_best_epoch_is_kept(write: Write, tmp_path: Path) -> None:
    config = load_config(write("[train]\nepochs = 30\nbatch = 50\nlr = 0.02\npatience = 2\n"))
    result = train(config, tmp_path / "out")
    assert len(result.curve) < 30
    assert result.validation == max(result.curve) == result.curve[result.epoch - 1]


def test_lenet(write: Write, tmp_path: Path) -> None:
    text = "[model]\nkind = 'lenet5'\nwidths = [4, 6, 16, 4]\n[train]\nepochs = 1\nbatch = 50\n"
    result = train(load_config(write(text, side=28)), tmp_path / "out")
    assert result.weights == 25 * 4 + 25 * 4 * 6 + 16 * 6 * 16 + 16 * 4


def test_shifted_images_are_moved_whole() -> None:
    x = torch.zeros(50, 1, 7, 7)
    x[:, 0, 3, 3] = 1
    moved = shifted(x, 2, -1.0, torch.Generator().manual_seed(0))
    assert (moved == 1).sum() == 50
    places = (moved == 1).nonzero()[:, 2:]
    assert places.min() == 1
    assert places.max() == 5
    assert len(places.unique(dim=0)) > 10
    assert (moved == -1).any()
    assert shifted(x, 0, -1.0, torch.Generator()) is x


def test_norms_are_measured_anew_for_validation(write: Write, tmp_path: Path) -> None:
    """At a rate at which signs turn every step, running statistics are of no network; those measured afterwards are."""
    config = load_config(write("[train]\nepochs = 1\nbatch = 100\nlr = 0.02\n"))
    train(config, tmp_path / "out")
    model, images = load(tmp_path / "out"), data.load(config)
    seen: list[torch.Tensor] = []
    model.norm1.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    model(images.train[0])
    torch.testing.assert_close(model.norm1.running_mean, seen[0].mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[train]\nepoch = 3\n", "did you mean epochs"),
        ("[train]\nepochs = 'many'\n", "must be int"),
        ("[train]\nepochs = 0\n", "must be positive"),
        ("[train]\nrest_bits = 4\n", "rest_bits is 4"),
        ("[train]\nsequence_level = true\n", "sequence_level is for translation with a teacher"),
        ("[seeds]\nformat = 'dense'\n[train]\nrest_bits = 8\n", "32 for a dense network"),
        ("[seeds]\nformat = 'stream'\nbytes = 99\n[train]\ndense_lr = 0.0\n", "dense_lr is 0"),
        ("[seeds]\nformat = 'trellis'\n", "choose one of"),
        ("[model]\nkind = 'vgg'\n", "choose one of"),
        ("[model]\nwidths = [3]\n", "no network"),
        ("[model]\nwidths = ['a', 2]\n", "whole numbers"),
        ("[seeds]\nblocks = [8]\n", "1 entries for 2 matrices"),
        ("[train]\nphases = 'two'\n", "choose one of one, three, rounds"),
        ("[train]\ndtype = 'float16'\n", "choose one of float32, bfloat16"),
        ("[seeds]\nformat = 'packed128'\n[train]\nphases = 'rounds'\n", 'phases = "rounds" changes discrete bits'),
        ("[seeds]\nformat = 'packed64'\n[train]\nflip_every = 2\n", "which outer128 and packed128 have"),
        ("[train]\nbeam_every = 2\n", "which packed128 have"),
        ("[train]\nbeam_share = 2\n", "beam_share is 2"),
        ("[train]\nbeam_every = -2\n", "0 or more"),
        ("[other]\n", "not known"),
        ("x = [", "no TOML"),
    ],
)
def test_what_a_configuration_cannot_say(write: Write, text: str, complaint: str) -> None:
    with pytest.raises(RbeError, match=complaint):
        load_config(write(text))


def test_data_that_is_not_there_or_is_something_else(write: Write, tmp_path: Path) -> None:
    path = write()
    config = load_config(path)
    with pytest.raises(RbeError, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(RbeError, match="no data file"):
        train(replace(config, data=replace(config.data, path="none.npz")), tmp_path / "out")
    with pytest.raises(RbeError, match="keep some of both"):
        train(replace(config, data=replace(config.data, validation=600)), tmp_path / "out")
    np.savez(tmp_path / "data.npz", x_train=np.zeros(3))
    with pytest.raises(RbeError, match="has no y_train"):
        train(config, tmp_path / "out")
    (tmp_path / "data.npz").write_bytes(b"nonsense")
    with pytest.raises(RbeError, match=r"is no \.npz"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_run(write: Write, tmp_path: Path) -> None:
    config = load_config(write("[seeds]\nformat = 'dense'\n[train]\nepochs = 2\nbatch = 50\n"))
    with pytest.raises(RbeError, match="no number"):
        train(replace(config, train=replace(config.train, lr=1e30)), tmp_path / "out")


class Halves(nn.Module):
    """A layer of another kind: weights that are stored in two bytes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def stored(self) -> tuple[int, int]:
        return self.matrix.numel(), 2 * self.matrix.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.matrix, self.bias)


def test_a_network_of_other_layers_runs_in_the_same_harness(write: Write, tmp_path: Path) -> None:
    config = load_config(write(QUICK.replace("flip_every = 4", "flip_every = 0")))

    def build(config: Config) -> nn.Module:
        return nn.Sequential(nn.Flatten(), Halves(64, 4))

    result = train(config, tmp_path / "out", build=build)
    assert (result.weights, result.seed_bytes, result.bytes) == (256, 512, 512 + 16)
    assert result.ratio == 2
    assert result.accuracy > 0.6
    assert load(tmp_path / "out", build)(torch.zeros(1, 8, 8)).shape == (1, 4)


def test_the_command_writes_a_page_and_one_line(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn.train(write("[seeds]\nblock = 8\nbytes = 600\n" + QUICK), tmp_path / "out", False, True)
    line = json.loads(capsys.readouterr().out)
    assert line["accuracy"] == line["value"]
    assert {"seed_bytes", "bytes", "ratio", "seconds", "plan"} <= set(line)
    assert line["seed_bytes"] <= 600
    page = (tmp_path / "out" / learn.PAGE).read_text()
    assert "test accuracy" in page and "bytes of matrices" in page and "bytes of the whole model" in page
    # The folder is no compressed one, but can become one.
    with pytest.raises(RbeError, match=r"rbe\.save\(rbe\.train\.load"):
        work.require_seeds(tmp_path / "out")
    rbe.save(load(tmp_path / "out"), tmp_path / "small")
    assert checkpoint.verify(tmp_path / "small").ok
    for part in ("<svg", "signs that have turned", "learning rates", "validation accuracy", "4 / 4"):
        assert part in page
    assert "<script" not in page
    assert 'http-equiv="refresh"' not in page  # only that of a run which goes on is read anew


def test_the_command_says_how_far_the_teacher_has_translated(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object, told: Callable[[int, int], object], **__: object) -> None:
        for done in range(200, 12_001, 200):
            told(done, 12_000)
        raise Stopped

    monkeypatch.setattr(learn, "run", run)
    with pytest.raises(Stopped):
        learn.train(write(QUICK), tmp_path / "out", False, True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[4] for line in lines] == ["5,000", "10,000", "12,000"]


def test_the_page_of_a_run_that_goes_on_is_read_anew(write: Write, tmp_path: Path) -> None:
    config = load_config(write(QUICK))
    page = learn._Page(config, tmp_path)
    train(config, tmp_path / "out", page.update)
    assert 'http-equiv="refresh"' in (tmp_path / learn.PAGE).read_text()
