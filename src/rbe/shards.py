"""Safetensors files: strict headers, lazy tensors, files written as a stream, checksums, atomic small files.

Headers are read here and not by the safetensors package because every way a file can be wrong must have a sentence of
its own, and because a tensor that is only copied must not pass through torch.
"""

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from rbe.errors import CorruptFile, RbeError

SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
# The safetensors package refuses longer headers too.
_LONGEST_HEADER = 100_000_000
# Tensor data starts on a cache line, so that the seeds of a block at 2 bits are one.
_ALIGN = 64
_CHUNK = 1 << 22


def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors has for a dtype.

    >>> dtype_name(torch.bfloat16)
    'BF16'
    """
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype | None:
    """The inverse of `dtype_name`; None where torch has no such dtype."""
    return _TORCH.get(name)


@dataclass(frozen=True)
class Stored:
    """One tensor inside a safetensors file; the bytes stay there until they are read.

    Attributes:
        file: path of the file.
        name, dtype, shape: as in the header.
        start, stop: byte offsets in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.stop - self.start

    def read(self, copy: bool = True) -> Tensor:
        """The tensor; without a copy it lies on the file's pages, which the system can drop and read again.

        Raises:
            CorruptFile: torch has no such dtype.
        """
        dtype = torch_dtype(self.dtype)
        if dtype is None:
            raise CorruptFile(f"{self.file.name}: {self.name} is {self.dtype}, which torch cannot hold")
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        page = self.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            # Copy-on-write, because torch warns about memory that it may not write to.
            view = mmap.mmap(file.fileno(), self.stop - page, access=mmap.ACCESS_COPY, offset=page)
        flat = torch.frombuffer(view, dtype=torch.uint8, offset=self.start - page, count=self.nbytes)
        if copy or self.start % SIZES[self.dtype]:
            flat = flat.clone()
        return flat.view(dtype).reshape(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """The raw bytes, a few megabytes at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                data = file.read(min(left, _CHUNK))
                if not data:
                    raise CorruptFile(f"{self.file.name}: ends inside {self.name}; the file was cut while it was read")
                left -= len(data)
                yield data


@dataclass(frozen=True)
class Outgoing:
    """One tensor to be written: what the header says of it, and where its bytes come from when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        count = SIZES[self.dtype]
        for side in self.shape:
            count *= side
        return count


def outgoing(name: str, tensor: Tensor) -> Outgoing:
    """A tensor in memory, to be written under a name."""
    return Outgoing(name, dtype_name(tensor.dtype), tuple(tensor.shape), lambda: (raw(tensor),))


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor as safetensors stores them: row-major, little-endian.

    >>> raw(torch.tensor([1, 256], dtype=torch.int16)).hex()
    '01000001'
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def checksum(name: str, dtype: str, shape: Sequence[int], data: Iterable[bytes]) -> str:
    """SHA-256 over a tensor's name, dtype, shape and bytes.

    >>> checksum("w", "U8", (2,), [bytes([1]), bytes([2])]) == checksum("w", "U8", (2,), [bytes([1, 2])])
    True
    """
    digest = hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode() + b"\0")
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CorruptFile: the file is absent, unreadable, no JSON or no object.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing; fetch the folder again") from None
    except OSError as cause:
        raise CorruptFile(f"{path} cannot be read: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise CorruptFile(f"{path} is not readable JSON ({cause}); fetch it again") from cause
    if not isinstance(value, dict):
        raise CorruptFile(f"{path} holds no JSON object; fetch it again")
    return value


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, every promise of the header checked against the file's length.

    Raises:
        CorruptFile: the file is absent, cut, or its header does not describe exactly the bytes that follow it.
    """

    def wrong(what: str) -> CorruptFile:
        return CorruptFile(f"{path} is no intact safetensors file: {what}; fetch it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            lead = file.read(8)
            length = int.from_bytes(lead, "little")
            if len(lead) < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise wrong(f"its header should be {length} bytes long, the file is {size}")
            text = file.read(length)
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing; fetch the folder again") from None
    except OSError as cause:
        raise CorruptFile(f"{path} cannot be read: {cause.strerror or cause}") from cause
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not text to text")
        found = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
        raise wrong(f"its header does not make sense ({cause})") from cause
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            raise wrong(f"{tensor.name} starts at byte {tensor.start} and not at {end}")
        end = tensor.stop
    if end != size:
        raise wrong(f"its tensors end at byte {end}, the file at {size}")
    return found, metadata


def _entry(path: Path, name: str, value: dict[str, Any], base: int) -> Stored:
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in SIZES:
        raise ValueError(f"{name} has dtype {dtype!r}, which this version does not know")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has shape {shape} and offsets {start}, {stop}")
    count = SIZES[dtype]
    for side in shape:
        count *= side
    if stop - start != count:
        raise ValueError(f"{name} is {dtype} {list(shape)}, {count} bytes, but has {stop - start}")
    return Stored(path, name, dtype, shape, base + start, base + stop)


def header_bytes(tensors: Sequence[Outgoing], metadata: dict[str, str]) -> bytes:
    """Length and header of a file of these tensors in this order, padded so that the data starts aligned."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        ends = [offset, offset := offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": ends}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def put(file: IO[bytes], data: bytes) -> None:
    """Write to a file; every byte that this library stores passes here."""
    file.write(data)


def write(path: Path, tensors: Iterable[Outgoing], metadata: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Write a safetensors file, holding one tensor at a time, and force it to the disk.

    Widest elements first, as the safetensors package does, so that every tensor is aligned.

    Returns:
        (SHA-256 of the file, checksum of every tensor).
    """
    ordered = sorted(tensors, key=lambda t: -SIZES[t.dtype])
    whole = hashlib.sha256()
    sums = {}
    with path.open("wb") as file:

        def store(data: bytes) -> bytes:
            whole.update(data)
            put(file, data)
            return data

        store(header_bytes(ordered, metadata))
        for tensor in ordered:
            before = file.tell()
            sums[tensor.name] = checksum(
                tensor.name, tensor.dtype, tensor.shape, (store(part) for part in tensor.chunks())
            )
            assert file.tell() - before == tensor.nbytes, f"{tensor.name}: the header promised {tensor.nbytes} bytes"
        flush(file)
    return whole.hexdigest(), sums


def flush(file: IO[bytes]) -> None:
    """Force what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Force a folder's names to the disk, where the system offers it."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file, of bytes or of what a function writes, so that its name shows the old content or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            if isinstance(data, bytes):
                put(file, data)
            else:
                data(file)
            flush(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def to_json(value: Any) -> bytes:
    """JSON for people: indented, keys in the order given, ending with a newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def canonical_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever its layout in a file.

    >>> canonical_digest({"a": 1, "b": 2}) == canonical_digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def copy(origin: Path, target: Path) -> None:
    """Copy the content of a file, a few megabytes at a time, and force it to the disk."""
    with origin.open("rb") as source, target.open("wb") as file:
        while data := source.read(_CHUNK):
            put(file, data)
        flush(file)


def locked(folder: Path) -> IO[str]:
    """The lock file of a folder, which is made where it is not there, open and locked.

    Raises:
        RbeError: another process holds it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / "lock").open("w")
        except FileNotFoundError:
            continue  # the folder has just been taken away
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                    return file
        except BlockingIOError:
            file.close()
            raise RbeError(
                f"{folder} is in use: another run is writing the same folder; wait for it, or choose another name"
            ) from None
        except OSError:  # no such locks on this file system
            return file
        file.close()  # a run that ended meanwhile has removed this file: a lock on it keeps nobody out
