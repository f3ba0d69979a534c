"""Interrupted runs: they go on where they stood, between epochs and within one, and end with the same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import QUICK, STREAM, Stopped, Write

from rbe.train import Progress, load, load_config, run, train
from rbe.train.run import CHECKPOINT


def test_an_interrupted_run_ends_as_if_nothing_had_happened(write: Write, tmp_path: Path) -> None:
    config = load_config(write("[seeds]\nformat = 'packed128'\nblock = 8\n" + QUICK))
    whole = train(config, tmp_path / "whole")

    def stop(p: object) -> None:
        raise Stopped

    for _ in range(2):
        with pytest.raises(Stopped):
            train(config, tmp_path / "part", stop)
        assert (tmp_path / "part" / CHECKPOINT).exists()
    result = train(config, tmp_path / "part")
    assert replace(result, seconds=0) == replace(whole, seconds=0)
    one, two = load(tmp_path / "whole").state_dict(), load(tmp_path / "part").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert train(config, tmp_path / "part") == result  # a finished run is read, not made again
    assert not (tmp_path / "part" / CHECKPOINT).exists()


@pytest.mark.parametrize(
    "text",
    [
        "[seeds]\nformat = 'packed128'\nblock = 8\n[train]\nepochs = 2\nbatch = 100\nflip_every = 2\n",
        "[train]\nepochs = 2\nbatch = 100\nphases = 'rounds'\n",
        STREAM,
    ],
    ids=["flips", "rounds", "streams"],
)
def test_a_run_that_is_interrupted_at_every_step(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    config = load_config(write(text))
    told: list[Progress] = []
    whole = train(config, tmp_path / "whole", told.append)
    monkeypatch.setattr(run, "EVERY", -1.0)
    seen: list[Progress] = []
    again: list[Progress] = []

    def stop(p: Progress) -> None:
        if seen and seen[-1].epoch == p.epochs:
            again.append(p)
            return  # a run that is restored when all epochs are done says so once more, for its page
        seen.append(p)
        raise Stopped

    for _ in range(len(whole.curve) * 50):
        try:
            result = train(config, tmp_path / "part", stop)
            break
        except Stopped:
            pass
    assert replace(result, seconds=0) == replace(whole, seconds=0)
    one, two = load(tmp_path / "whole").state_dict(), load(tmp_path / "part").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert seen[-1].history == told[-1].history
    assert [p.history for p in again] == [told[-1].history]
    assert len(seen) == len(whole.curve) * seen[0].steps > 2 * len(whole.curve)
    assert [p.step for p in seen[: seen[0].steps + 1]] == [*range(1, seen[0].steps), 0, 1]
    assert (seen[0].validation, seen[0].best) == (None, None)
    assert all(p.left > 0 for p in seen[:-1])
