"""Folders of runs: one process at a time, nothing half written, nothing of another run."""

import fcntl
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_cases import QUICK, STREAM, Stopped, Write
from torch import nn

import rbe.train
from rbe.cli import learn
from rbe.errors import RbeError
from rbe.train import Config, Progress, load, load_config, networks, store, train
from rbe.train.run import CHECKPOINT, RESULT, TASKS, WEIGHTS


def stop(_: Progress | None) -> None:
    raise Stopped


def interrupted(config: Config, out: Path) -> None:
    with pytest.raises(Stopped):
        train(config, out, stop)


def test_somebody_who_has_only_the_folder_can_use_the_network(write: Write, tmp_path: Path) -> None:
    train(load_config(write(QUICK)), tmp_path / "out")
    result, model = rbe.train.read_result(tmp_path / "out"), rbe.train.load(tmp_path / "out")
    parts = np.load(tmp_path / "data.npz")
    about = result.inputs
    x = (torch.from_numpy(parts["x_test"])[:, None] / 255 - about["mean"]) / about["deviation"]
    right = model(x).argmax(1) == torch.from_numpy(parts["y_test"].astype(int))
    assert right.double().mean().item() == pytest.approx(result.value)
    with pytest.raises(RbeError, match="no finished run"):
        rbe.train.read_result(tmp_path)


def test_what_has_changed_in_a_configuration_is_told(write: Write, tmp_path: Path) -> None:
    config = load_config(write(QUICK))
    longer = replace(config, train=replace(config.train, epochs=9))
    interrupted(config, tmp_path / "out")
    for _ in range(2):
        with pytest.raises(RbeError, match=r"train\.epochs was 4, now it is 9"):
            train(longer, tmp_path / "out")
        train(config, tmp_path / "out")


def test_a_folder_in_use_is_left_alone(write: Write, tmp_path: Path) -> None:
    config, out = load_config(write(QUICK)), tmp_path / "out"

    def second(_: Progress) -> None:
        with pytest.raises(RbeError, match="in use"):
            train(config, out)
        with pytest.raises(RbeError, match="in use"):
            train(config, out, restart=True)

    result = train(config, out, second)
    assert sorted(path.name for path in out.iterdir()) == sorted([RESULT, WEIGHTS])
    assert train(config, out) == result


def test_restart_throws_away_at_once(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = load_config(write(QUICK)), tmp_path / "out"

    def killed() -> None:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr("rbe.train.run._Run.epoch", lambda *_: stop(None))
            train(config, out, restart=True)

    interrupted(config, out)
    killed()
    assert not list(out.iterdir())
    train(config, out)
    killed()
    assert not list(out.iterdir())


def test_a_refused_restart_keeps_what_there_is(write: Write, tmp_path: Path) -> None:
    config, out = load_config(write(QUICK)), tmp_path / "out"
    result = train(config, out)
    (tmp_path / "data.npz").unlink()
    with pytest.raises(RbeError, match="no data file"):
        train(config, out, restart=True)
    assert train(config, out) == result


def test_a_network_of_another_run_is_not_taken_for_its_own(write: Write, tmp_path: Path) -> None:
    config = load_config(write(QUICK))
    other = replace(config, train=replace(config.train, seed=1))
    train(config, tmp_path / "out")
    train(other, tmp_path / "other")
    (tmp_path / "out" / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    for read in (lambda: load(tmp_path / "out"), lambda: train(config, tmp_path / "out")):
        with pytest.raises(RbeError, match="not of the run"):
            read()


@pytest.mark.parametrize("when", ["before the network", "after the network"])
def test_killed_while_it_ends(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Over the finished run of another configuration: there is a run to go on with, or none."""
    config, out = load_config(write(QUICK)), tmp_path / "out"
    train(replace(config, train=replace(config.train, seed=1)), out)
    whole, put = train(config, tmp_path / "whole"), store.write

    def write_until(path: Path, data: bytes) -> None:
        if path.name == (WEIGHTS if when == "before the network" else RESULT):
            raise Stopped
        put(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", write_until)
        with pytest.raises(Stopped):
            train(config, out, restart=True)
    with pytest.raises(RbeError, match="no finished run"):
        load(out)
    again = train(config, out)
    assert replace(again, seconds=0.0) == replace(whole, seconds=0.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda known: known["result"].pop("curve"),
        lambda known: known["result"].update(plan=[{"x": 1}]),
        lambda known: known["config"]["train"].update(lr=0.5),
        lambda known: known.update(result=5),
    ],
    ids=["no curve", "no plan", "another rate", "no result"],
)
def test_a_damaged_result_is_told(write: Write, tmp_path: Path, damage: Callable[[dict[str, object]], object]) -> None:
    config, out = load_config(write(QUICK)), tmp_path / "out"
    train(config, out)
    known = json.loads((out / RESULT).read_text())
    damage(known)
    (out / RESULT).write_text(json.dumps(known))
    with pytest.raises(RbeError, match=r"damaged|another run"):
        train(config, out)
    (out / RESULT).write_text("{")
    with pytest.raises(RbeError, match="damaged"):
        train(config, out)


def test_what_cannot_be_written_is_told(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write(QUICK))
    (tmp_path / "file").write_text("")
    with pytest.raises(RbeError, match="cannot be written to"):
        train(config, tmp_path / "file")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rbe.shards.flush", full)
    with pytest.raises(RbeError, match=r"checkpoint\.pt cannot be written.*No space left"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["data", "start", "teacher"])
def test_a_run_does_not_go_on_with_something_else(write: Write, tmp_path: Path, what: str) -> None:
    config = load_config(write(STREAM))
    dense = replace(config, name="dense", seeds=replace(config.seeds, format="dense", bytes=0))
    dense = replace(dense, train=replace(dense.train, epochs=1, lr=1e-2))
    train(dense, tmp_path / "dense")
    if what == "start":
        config = replace(config, model=replace(config.model, start="dense"))
    if what == "teacher":
        config = replace(config, train=replace(config.train, teacher="dense"))
    interrupted(config, tmp_path / "out")
    if what == "data":
        parts = dict(np.load(tmp_path / "data.npz"))
        parts["x_train"] = parts["x_train"][::-1]
        np.savez(tmp_path / "data.npz", **parts)
    else:
        train(replace(dense, train=replace(dense.train, seed=1)), tmp_path / "dense", restart=True)
    with pytest.raises(RbeError, match="not what they were"):
        train(config, tmp_path / "out")


def test_norms_are_measured_over_full_batches(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 images, 498 at once: the two that are left would count as much."""
    config = load_config(write("[train]\nepochs = 1\nbatch = 498\nlr = 0.02\n"))
    sizes = []
    batches = TASKS["images"].batches

    def seen(self: object, generator: torch.Generator) -> object:
        for batch in batches(self, generator):  # type: ignore[arg-type]
            sizes.append(len(batch.targets))
            yield batch

    monkeypatch.setattr(TASKS["images"], "batches", seen)
    train(config, tmp_path / "out")
    assert sizes[-1] == 498


def test_a_network_of_no_numbers_is_not_kept(write: Write, tmp_path: Path) -> None:
    config = load_config(write("[seeds]\nformat = 'dense'\n[train]\nepochs = 1\nsteps = 1\nbatch = 50\n"))
    config = replace(config, train=replace(config.train, lr=1e30))  # more than a file may ask for
    with pytest.raises(RbeError, match="no epoch left a network of finite numbers"):
        train(config, tmp_path / "out")
    with pytest.raises(RbeError, match="no finished run"):
        load(tmp_path / "out")


def test_the_lock_of_a_killed_process_keeps_nobody_out(write: Write, tmp_path: Path) -> None:
    config, out = load_config(write(QUICK)), tmp_path / "out"
    out.mkdir()
    with (out / "lock").open("w") as file:  # as another process would hold it
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RbeError, match="in use"):
            train(config, out)
    assert (out / "lock").exists()
    assert train(config, out).epoch
    assert sorted(path.name for path in out.iterdir()) == sorted([RESULT, WEIGHTS])


@pytest.mark.parametrize("same", [True, False])
def test_a_run_that_ended_while_this_one_came_is_seen(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    config, out, held = load_config(write(QUICK)), tmp_path / "out", store.held
    first = config if same else replace(config, train=replace(config.train, seed=1))

    def late(folder: Path) -> AbstractContextManager[None]:
        monkeypatch.setattr(store, "held", held)
        train(first, out)
        return held(folder)

    monkeypatch.setattr(store, "held", late)
    told: list[Progress] = []
    if same:
        assert train(config, out, told.append).epoch
    else:
        with pytest.raises(RbeError, match="another run"):
            train(config, out, told.append)
    assert not told
    assert json.loads((out / RESULT).read_text())["config"]["train"]["seed"] == first.train.seed


def test_a_refused_run_leaves_no_folder(write: Write, tmp_path: Path) -> None:
    config = load_config(write(QUICK))
    with pytest.raises(RbeError, match="no finished run"):
        train(replace(config, train=replace(config.train, teacher="nowhere")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whole_run_beside_its_checkpoint_is_finished(write: Write, tmp_path: Path) -> None:
    config, out = load_config(write(QUICK)), tmp_path / "out"
    interrupted(config, out)
    checkpoint = (out / CHECKPOINT).read_bytes()
    result = train(config, out)
    (out / CHECKPOINT).write_bytes(checkpoint)
    told: list[Progress] = []
    assert train(config, out, told.append) == result
    assert not told
    (out / RESULT).write_text("{")  # half of it: the checkpoint goes on
    assert replace(train(config, out, told.append), seconds=0.0) == replace(result, seconds=0.0)
    assert told


def test_another_number_of_threads_may_go_on(write: Write, tmp_path: Path) -> None:
    config, before = load_config(write(QUICK)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        interrupted(config, tmp_path / "out")
        torch.set_num_threads(3)
        assert train(config, tmp_path / "out").epoch
    finally:
        torch.set_num_threads(before)


def test_a_mask_that_is_not_finite_is_no_divergence(write: Write, tmp_path: Path) -> None:
    def masked(config: Config) -> nn.Module:
        network = networks.build(config)
        network.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        return network

    assert train(load_config(write(QUICK)), tmp_path / "out", build=masked).epoch


def test_the_command_says_whether_anything_was_trained(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = load_config(write("[seeds]\nformat = 'dense'\n[train]\nepochs = 1\nbatch = 50\n"))
    train(dense, tmp_path / "dense")
    path = write("[model]\nwidths = [64, 32, 4]\nstart = 'dense'\n[seeds]\nformat = 'dense'\n[train]\nepochs = 0\n")
    for again in (False, True):
        learn.train(path, tmp_path / "out", False, True)
        assert ("finished before" in capsys.readouterr().err) == again
