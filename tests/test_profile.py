"""Measurements: exact where they count, ordered where they time."""

import time
from pathlib import Path

import pytest
import torch

from rbe import profile
from rbe.errors import RbeError


def test_files_are_counted_as_they_lie(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "deep" / "b.json").write_bytes(b"x" * 7)
    assert profile.files(tmp_path) == profile.Files(total=107, weights=100, count=2)
    assert profile.files(tmp_path / "a.safetensors") == profile.Files(total=100, weights=100, count=1)
    with pytest.raises(RbeError, match="does not exist"):
        profile.files(tmp_path / "none")


def test_tied_tensors_are_counted_once() -> None:
    a, b = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    assert profile.tensor_bytes(torch.nn.Sequential(a, b)) == 128
    b.weight = a.weight
    assert profile.tensor_bytes(torch.nn.Sequential(a, b)) == 64


def test_each_call_is_made_as_often_as_said() -> None:
    made = {"a": 0, "b": 0}

    def call(name: str) -> None:
        made[name] += 1

    found = profile.time_each({n: lambda n=n: call(n) for n in made}, warm_up=2, repeats=5)  # type: ignore[misc]
    assert made == {"a": 7, "b": 7} and found["a"].repeats == 5


def test_a_longer_call_takes_longer_and_time_is_kept() -> None:
    found = profile.time_each(
        {"short": lambda: None, "long": lambda: time.sleep(0.02)}, warm_up=0, repeats=1000, seconds=0.05
    )
    assert found["long"].median > found["short"].median
    assert found["long"].repeats < 1000


def test_operations_of_a_product() -> None:
    a, b = torch.zeros(5, 7), torch.zeros(7, 3)
    assert profile.operations(lambda: a @ b) == profile.Operations(macs=105, flops=210)


def test_memory_of_a_fresh_process_does_not_see_this_one() -> None:
    ballast = bytearray(1 << 28)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    small = profile.memory("", "", "", {})
    assert small.peak < 1 << 27 < len(ballast)
    large = profile.memory("", "x = bytearray(arguments['n'])", "", {"n": 1 << 26})
    assert large.model - small.model >= (1 << 26) * 0.9


def test_memory_says_what_failed() -> None:
    with pytest.raises(RbeError, match="ZeroDivisionError"):
        profile.memory("", "1 / 0", "", {})
    with pytest.raises(RbeError, match="did not finish"):
        profile.memory("import time", "time.sleep(20)", "", {}, timeout=0.5)
