"""Training elsewhere than on the CPU, shown on a device that is made up."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from elsewhere import NAME, elsewhere
from run_cases import QUICK, STREAM, Stopped, Write
from typer.testing import CliRunner

from rbe.cli.app import app
from rbe.errors import RbeError
from rbe.train import Config, Progress, load, load_config, run, train
from rbe.train.config import Seeds

STEPS = "epochs = 2\nbatch = 50\nlr = 0.02\n"
NETWORKS = {
    "rounds": f"[train]\nphases = 'rounds'\n{STEPS}",
    "flips": f"[train]\nflip_every = 4\n{STEPS}",
    "beam": f"[seeds]\nformat = 'packed128'\n[train]\nbeam_every = 4\n{STEPS}",
    "packed64": f"[seeds]\nformat = 'packed64'\n[train]\n{STEPS}",
    "stream": STREAM,
    "lenet5": f"[model]\nkind = 'lenet5'\nwidths = [4, 6, 20, 4]\n[train]\n{STEPS}",
}


@pytest.fixture
def device() -> Iterator[str]:
    """A device that is there."""
    with elsewhere():
        yield NAME


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_trained_elsewhere(write: Write, tmp_path: Path, name: str) -> None:
    config = load_config(write(NETWORKS[name], 28 if name == "lenet5" else 8))
    here: list[Progress] = []
    there: list[Progress] = []
    train(config, tmp_path / "here", here.append)
    result = train(config, tmp_path / "there", there.append, device=NAME)
    # The same arithmetic in another order.
    assert [e.loss for e in there[-1].history] == pytest.approx([e.loss for e in here[-1].history], rel=0.02)
    assert [p.validation for p in there] == pytest.approx([p.validation for p in here], abs=0.05)
    assert load(tmp_path / "there").state_dict().keys() == load(tmp_path / "here").state_dict().keys()
    assert result.value > 0.25


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("task", ["characters", "language", "pairs"])
def test_texts_are_learned_elsewhere(request: pytest.FixtureRequest, tmp_path: Path, task: str) -> None:
    config: Config = request.getfixturevalue(task)
    config = replace(config, train=replace(config.train, epochs=1, steps=4))
    dense = replace(config, seeds=Seeds("dense"), model=replace(config.model, dropout=0.0))
    here, there = train(dense, tmp_path / "dense"), train(dense, tmp_path / "there", device=NAME)
    assert there.value == pytest.approx(here.value, rel=1e-3)
    taught = replace(config.train, teacher="dense", sequence_level=task == "pairs")
    for seeds in (config.seeds, Seeds("stream", bytes=9000)):
        student = replace(config, seeds=seeds, train=taught)
        here, there = (train(student, tmp_path / f"{seeds.format} {on}", device=on) for on in ("cpu", NAME))
        assert there.value == pytest.approx(here.value, rel=0.05)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("first", ["cpu", NAME])
@pytest.mark.parametrize("text", [NETWORKS["flips"], STREAM], ids=["flips", "stream"])
def test_a_run_moves_from_one_device_to_the_other(write: Write, tmp_path: Path, first: str, text: str) -> None:
    config = load_config(write(text))
    whole: list[Progress] = []
    train(config, tmp_path / "whole", whole.append)

    def stop(p: Progress) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(config, tmp_path / "part", stop, device=first)
    told: list[Progress] = []
    train(config, tmp_path / "part", told.append, device="cpu" if first == NAME else NAME)
    assert told[0].epoch == 2  # the first was not made again
    losses = ([e.loss for e in some[-1].history] for some in (told, whole))
    assert next(losses) == pytest.approx(next(losses), rel=0.02)
    assert load(tmp_path / "part")


@pytest.mark.usefixtures("device")
def test_a_run_goes_on_elsewhere_to_the_same_bits(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write(NETWORKS["flips"]))
    whole = train(config, tmp_path / "whole", device=NAME)
    monkeypatch.setattr(run, "EVERY", -1.0)
    steps = 0

    def stop(p: Progress) -> None:
        nonlocal steps
        steps += 1
        if steps < 8:
            raise Stopped

    for _ in range(7):
        with pytest.raises(Stopped):
            train(config, tmp_path / "part", stop, device=NAME)
    assert replace(train(config, tmp_path / "part", stop, device=NAME), seconds=0) == replace(whole, seconds=0)
    one, two = load(tmp_path / "whole").state_dict(), load(tmp_path / "part").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["gpu", "", "cuda", "cuda:99", "privateuseone", "xla", NAME, "mps"])
def test_a_device_that_is_not_there_is_refused(write: Write, tmp_path: Path, name: str) -> None:
    path = write(QUICK)
    with pytest.raises(RbeError, match=f"there is no device {re.escape(name)} here"):
        train(load_config(path), tmp_path / "out", device=name)
    made = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "out"), "--device", name])
    assert made.exit_code == 1
    assert f"there is no device {name} here" in made.stderr
    assert not (tmp_path / "out").exists()
