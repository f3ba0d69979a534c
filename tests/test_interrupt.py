"""A run killed at any moment goes on where it was and ends with the same bytes; the target is never seen half."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rbe import checkpoint, convert, shards
from rbe.convert.journal import Journal
from rbe.errors import CorruptFile

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes as POSIX does")


class Killed(BaseException):
    """Stands for SIGKILL: nothing below may catch it and go on."""


def compress(src, dst, **options):
    return convert.compress(src, dst, effort="fast", threads=1, fingerprint=lambda folder: {"is": 1}, **options)


def content(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A source and the bytes that an undisturbed run makes of it."""
    base = tmp_path_factory.mktemp("undisturbed")
    torch.manual_seed(0)
    tensors = {f"m{k}.weight": torch.randn(32, 48) for k in range(3)}
    save_file({**tensors, "m0.bias": torch.ones(32)}, base / "tiny.safetensors")
    compress(base / "tiny.safetensors", base / "seeds", max_shard_size=600)
    return base / "tiny.safetensors", content(base / "seeds")


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """Forcing bytes to the disk takes most of the time and no part in what is tested: processes die here, not disks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


class Machine:
    """Counts the steps that change the disk; at step `last` it dies, in the middle of a write if it is one."""

    def __init__(self, monkeypatch, last=None):
        self.step, self.last = 0, last
        for owner, name in (
            (shards, "put"),
            (os, "fsync"),
            (Path, "replace"),
            (Path, "rename"),
            (Path, "unlink"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self.counted(name, getattr(owner, name)))

    def counted(self, name, real):
        def step(*args, **options):
            self.step += 1
            if self.last is not None and self.step >= self.last:
                if name == "put" and self.step == self.last:
                    args[0].write(args[1][: len(args[1]) // 2])
                    args[0].flush()
                raise Killed
            return real(*args, **options)

        return step


def test_dying_at_any_step_loses_nothing(expected, tmp_path):
    src, whole = expected
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch)
        compress(src, tmp_path / "count", max_shard_size=600)
    assert machine.step > 40
    resumed = []
    for last in range(1, machine.step + 1):
        dst = tmp_path / str(last) / "seeds"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Machine(patch, last)
            compress(src, dst, max_shard_size=600)
        if dst.exists():
            assert content(dst) == whole
        resumed.append(compress(src, dst, max_shard_size=600).resumed)
        assert content(dst) == whole
        assert [path.name for path in dst.parent.iterdir()] == ["seeds"]
    assert set(resumed) == {0, 1, 2, 3}


def test_dying_while_an_older_result_is_replaced_leaves_one_of_the_two(expected, tmp_path):
    src, whole = expected
    compress(src, tmp_path / "old", bits=4)
    old = content(tmp_path / "old")
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch)
        compress(src, shutil.copytree(tmp_path / "old", tmp_path / "count"), max_shard_size=600)
    for last in range(machine.step - 16, machine.step + 1):
        dst = shutil.copytree(tmp_path / "old", tmp_path / str(last) / "seeds")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Machine(patch, last)
            compress(src, dst, max_shard_size=600)
        aside = dst.parent / ".seeds.rbe-old"
        assert content(dst if dst.exists() else aside) in (old, whole)
        compress(src, dst, max_shard_size=600)
        assert content(dst) == whole
        assert [path.name for path in dst.parent.iterdir()] == ["seeds"]


CHILD = """
import os, signal, sys
from rbe import convert
def kill(event):
    if event.stage == sys.argv[3] and event.done >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
convert.compress(sys.argv[1], sys.argv[2], effort="fast", threads=1, max_shard_size=600, progress=kill,
                 fingerprint=lambda folder: {"is": 1})
"""


@pytest.mark.parametrize(("stage", "done", "resumed"), [("encode", 1600, 1), ("write", 0, 3)])
def test_a_real_kill_loses_nothing(expected, tmp_path, stage, done, resumed):
    src, whole = expected
    dst = tmp_path / "seeds"
    child = subprocess.run([sys.executable, "-c", CHILD, src, dst, stage, str(done)], capture_output=True)
    assert child.returncode == -signal.SIGKILL and not dst.exists()
    again = compress(src, dst, max_shard_size=600)
    assert again.resumed == resumed and not again.remarks
    assert content(dst) == whole


def stop_after(count):
    """A progress callback that dies inside the matrix after so many."""

    def progress(event):
        if event.stage == "encode" and event.done > count * 32 * 48:
            raise Killed

    return progress


def test_a_damaged_piece_is_encoded_again(expected, tmp_path):
    src, whole = expected
    dst = tmp_path / "seeds"
    with pytest.raises(Killed):
        compress(src, dst, progress=stop_after(2))
    piece = sorted((tmp_path / ".seeds.rbe-partial" / "pieces").iterdir())[0]
    piece.write_bytes(piece.read_bytes()[:-1] + b"\x01")
    assert compress(src, dst, max_shard_size=600).resumed == 1
    assert content(dst) == whole


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b'{"journal"', b"[]\n", b'{"a":1}\n'])
def test_a_damaged_journal_is_no_obstacle(expected, tmp_path, garbage):
    src, whole = expected
    dst = tmp_path / "seeds"
    with pytest.raises(Killed):
        compress(src, dst, progress=stop_after(1))
    (tmp_path / ".seeds.rbe-partial" / "journal.jsonl").write_bytes(garbage)
    assert compress(src, dst, max_shard_size=600).resumed == 0
    assert content(dst) == whole


def test_work_on_something_else_is_not_used_and_that_is_said(expected, tmp_path):
    src, whole = expected
    dst = tmp_path / "seeds"
    for change in ({"bits": 4}, {"seed": 1}):
        with pytest.raises(Killed):
            compress(src, dst, progress=stop_after(2), **change)
        assert not dst.exists()
    done = compress(src, dst, max_shard_size=600)
    assert done.resumed == 0 and "other settings; started anew" in done.remarks[0]
    assert content(dst) == whole


def test_a_changed_source_starts_anew(expected, tmp_path):
    src = shutil.copy(expected[0], tmp_path / "tiny.safetensors")
    with pytest.raises(Killed):
        compress(src, tmp_path / "seeds", progress=stop_after(2))
    os.utime(src, ns=(1, 1))
    assert compress(src, tmp_path / "seeds").resumed == 0


def test_work_goes_on_with_other_threads_workers_and_shards(expected, tmp_path):
    src, _ = expected
    with pytest.raises(Killed):
        compress(src, tmp_path / "seeds", progress=stop_after(2))
    done = convert.compress(
        src, tmp_path / "seeds", effort="fast", threads=2, workers=2, fingerprint=lambda folder: {"is": 1}
    )
    assert done.resumed == 2 and checkpoint.verify(tmp_path / "seeds", src).ok


def test_a_journal_keeps_what_it_was_given(tmp_path):
    journal = Journal(tmp_path, "one")
    journal.add("a", 0, {"seeds": torch.arange(4)}, {"error": 0.5})
    again = Journal(tmp_path, "one")
    assert again.done == journal.done and again.done["a"]["error"] == 0.5 and not again.remark
    assert torch.equal(again.tensors("a")["seeds"].read(), torch.arange(4))
    (tmp_path / "pieces" / "000000.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptFile, match="was changed"):
        again.tensors("a")
    other = Journal(tmp_path, "two")
    assert not other.done and "started anew" in other.remark
    assert json.loads((tmp_path / "journal.jsonl").read_text())["fingerprint"] == "two"


def test_a_line_cut_by_a_kill_does_not_spoil_the_next_one(tmp_path):
    Journal(tmp_path, "one").add("a", 0, {"seeds": torch.arange(4)}, {})
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"name":"b"')
    Journal(tmp_path, "one").add("c", 2, {"seeds": torch.arange(5)}, {})
    assert set(Journal(tmp_path, "one").done) == {"a", "c"}


def test_a_result_moved_aside_by_a_killed_run_comes_back_at_once(expected, tmp_path):
    src, _ = expected
    compress(src, tmp_path / "seeds", bits=4)
    old = content(tmp_path / "seeds")
    (tmp_path / "seeds").rename(tmp_path / ".seeds.rbe-old")
    with pytest.raises(Killed):
        compress(src, tmp_path / "seeds", progress=stop_after(0))
    assert content(tmp_path / "seeds") == old
