"""Where a run works and where its result goes: targets, disk space, and the rename that makes a result visible."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rbe import checkpoint, shards
from rbe.errors import RbeError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full",
    errno.EFBIG: "a file became larger than this system allows",
}
# Headers, index, configuration and model card, beside the tensors and the copied files.
BESIDE = 1 << 20


def size(size: int | str) -> int:
    """Bytes of a size like "500MB".

    >>> size("1.5GB"), size(64)
    (1500000000, 64)
    """
    text = str(size).strip().upper().removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:], 1)
    try:
        value = int(float(text if factor == 1 else text[:-1]) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise RbeError(f"max_shard_size {size!r} is no size; give bytes, or something like '500MB' or '5GB'")
    return value


def free_target(src: Path, dst: Path) -> Path:
    """The absolute path of a target that may be written."""
    given, origin = dst, src.resolve()
    dst = dst.resolve()
    if dst == origin or origin in dst.parents or dst in origin.parents:
        raise RbeError(f"{given} and the source {src} lie in each other; give a folder elsewhere")
    refuse_foreign(dst)
    parent = existing(dst.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RbeError(f"{given} cannot be created: {parent} is no folder that you may write to")
    return dst


def is_free(path: Path) -> bool:
    """Whether there is nothing, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def refuse_foreign(dst: Path) -> None:
    """Let pass what `compress` may replace: nothing, an empty folder, or a folder that it wrote itself.

    Raises:
        RbeError: it is something else, or holds something else.
    """
    if is_free(dst):
        return
    if not checkpoint.is_ours(dst):
        raise RbeError(f"{dst} exists and was not written by rbe; nothing was changed: choose another name")
    foreign = checkpoint.strangers(dst)
    if foreign:
        raise RbeError(
            f"{dst} was written by rbe, but holds other files too ({', '.join(foreign[:3])}), which replacing it "
            "would delete; move them, or choose another name"
        )


def put_back(dst: Path) -> None:
    """Undo the first of the last two renames of a run that was killed between them."""
    if _aside(dst).exists() and not dst.exists():
        _aside(dst).rename(dst)


def _aside(dst: Path) -> Path:
    return dst.parent / f".{dst.name}.rbe-old"


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a work folder and keep a second run out of it; a killed run's lock goes with it.

    Raises:
        RbeError: another run is at work there.
    """
    with shards.locked(folder):
        yield


def remove(folder: Path) -> None:
    """Take a work folder away whose lock is held: the lock goes last, so that nobody begins in what is left."""
    for file in folder.iterdir():
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        elif file.name != "lock":
            file.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def occupied(folder: Path) -> int:
    """Bytes of all files in a folder; another run may be removing them."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            about = file.stat()
            total += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return total


@contextmanager
def disk_errors(dst: Path, work: Path, resumes: bool) -> Iterator[None]:
    """Turn a full disk into a message; what a run that can go on has done stays in the work folder."""
    try:
        yield
    except OSError as cause:
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        shutil.rmtree(work / "out" if resumes else work, ignore_errors=True)
        kept = f"what is done is kept in {work}; " if resumes else "nothing was left behind; "
        raise RbeError(
            f"{_FULL[cause.errno]}: {dst} could not be written; {kept}free some space and run the same command again"
        ) from cause


def publish(out: Path, dst: Path) -> None:
    """Give a complete folder its name, in one step where the name is free."""
    for folder in sorted({file.parent for file in out.rglob("*")}, reverse=True):
        shards.flush_folder(folder)
    aside = _aside(dst)
    refuse_foreign(dst)  # once more: hours may have passed
    if not is_free(dst):
        shutil.rmtree(aside, ignore_errors=True)
        dst.rename(aside)
    elif dst.exists():
        dst.rmdir()
    out.rename(dst)
    shards.flush_folder(dst.parent)
    shutil.rmtree(aside, ignore_errors=True)
