"""Work folders: locks that hold while another run takes the folder away, and files that vanish while counted."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rbe import convert
from rbe.convert import pipeline, place
from rbe.errors import RbeError


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A file with one matrix."""
    save_file({"a.weight": torch.randn(32, 32)}, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_the_work_folder_is_locked_to_its_end(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = pipeline.shutil.rmtree
    refused = []

    def remove(path: Path, *more: object, **options: object) -> None:
        if str(path).endswith(".rbe-partial"):
            with pytest.raises(RbeError, match="in use"), place.lock(path):
                pass
            refused.append(path)
        removed(path, *more, **options)

    monkeypatch.setattr(pipeline.shutil, "rmtree", remove)
    convert.compress(bare, tmp_path / "seeds", effort="fast", threads=1)
    assert len(refused) == 1 and not refused[0].exists()


def test_a_lock_on_a_folder_that_was_taken_away_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import shutil

    folder, taken = tmp_path / "work", []
    lock = fcntl.flock

    def slow(file: object, how: int) -> None:
        if not taken:  # between opening and locking, another run ends and removes its folder
            shutil.rmtree(folder)
        taken.append(how)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with place.lock(folder):
        assert len(taken) == 2 and (folder / "lock").exists()
        with pytest.raises(RbeError, match="in use"), place.lock(folder):
            pass


def test_files_that_vanish_while_space_is_counted_count_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    assert place.occupied(tmp_path) == 10
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for k in range(50):
                (tmp_path / f"{k}.tmp").write_bytes(b"")
            for k in range(50):
                (tmp_path / f"{k}.tmp").unlink()

    other = threading.Thread(target=churn)
    other.start()
    try:
        assert {place.occupied(tmp_path) for _ in range(200)} == {10}
    finally:
        stop.set()
        other.join()
