"""The file of a trained network: its tensors one after the other, and nothing that the configuration says already.

    "rbe1" | CRC-32 of what follows, uint32 | number of exceptions | their places | their dtypes | tensors

Numbers are varints: seven bits a byte, the lowest first, the eighth set where more follow. An exception is a tensor
whose dtype is not the expected one, which is given as a place in `DTYPES`. Tensors are in the order of the state dict,
row by row, little-endian; only those of streams are preceded by their length in bytes.
"""

import math
import sys
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rbe.errors import RbeError

MAGIC = b"rbe1"
DTYPES = (
    torch.float32,
    torch.float16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.bfloat16,
    torch.float64,
)
# The length of these is known only to the file.
_STREAM = ".seed"
# Of a varint: 63 bits.
_LONGEST = 9


def write(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bytes:
    """The file of the tensors that `rbe.nn.pack` made.

    >>> tensors = {"0.seed": torch.arange(5, dtype=torch.uint8), "0.scale": torch.tensor(0.5)}
    >>> len(write(tensors, tensors)), read(write(tensors, tensors), tensors)["0.seed"].tolist()
    (19, [0, 1, 2, 3, 4])

    Args:
        tensors: by name.
        expected: the same names with the shapes and dtypes that a fresh network of the configuration has.

    Raises:
        RbeError: a fresh network has other tensors, so that nothing could read the file.
    """
    if list(tensors) != list(expected):
        odd = sorted({*tensors} ^ {*expected}) or ["their order"]
        raise RbeError(
            f"train: a fresh network has other tensors than the trained one ({', '.join(odd[:4])}); build it alike"
        )
    exceptions = {}
    for k, (name, tensor) in enumerate(tensors.items()):
        like, stream = expected[name], _is_stream(name)
        if tensor.dtype not in DTYPES or (stream and tensor.dtype != torch.uint8):
            raise RbeError(f"train: {name} is {tensor.dtype}, which the file of a trained network cannot hold")
        if tensor.shape != like.shape and not stream:
            raise RbeError(
                f"train: {name} is {tuple(tensor.shape)} in the trained network and {tuple(like.shape)} in a fresh "
                "one; build it alike"
            )
        if tensor.dtype != like.dtype:
            exceptions[k] = DTYPES.index(tensor.dtype)
    parts = [_varint(len(exceptions)), *map(_varint, exceptions), *map(_varint, exceptions.values())]
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        data = _little(data, tensor.element_size())
        parts += [_varint(len(data)), data] if _is_stream(name) else [data]
    body = b"".join(parts)
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def read(data: bytes, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `write`.

    Raises:
        ValueError: the file is damaged, or of another network.
    """
    if data[:4] != MAGIC:
        raise ValueError(f"it begins with {data[:4]!r}, not {MAGIC!r}")
    body = memoryview(data)[8:]
    if zlib.crc32(body) != int.from_bytes(data[4:8], "little"):
        raise ValueError("it was changed after it was written")
    reader = _Reader(body)
    places = [reader.varint() for _ in range(min(reader.varint(), len(expected)))]
    dtypes = {k: DTYPES[reader.varint() % len(DTYPES)] for k in places}
    out = {}
    for k, (name, like) in enumerate(expected.items()):
        stream = _is_stream(name)
        shape = (reader.varint(),) if stream else tuple(like.shape)
        out[name] = reader.tensor(torch.uint8 if stream else dtypes.get(k, like.dtype), shape)
    if reader.place != len(body):
        raise ValueError(f"it has {len(body) - reader.place} bytes that this network has no place for")
    return out


def _is_stream(name: str) -> bool:
    return f".{name}".endswith(_STREAM)


def _little(data: bytes, size: int) -> bytes:
    """Numbers of so many bytes, between this machine's order and the file's."""
    return data if sys.byteorder == "little" else np.frombuffer(data, f"u{size}").byteswap().tobytes()


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


class _Reader:
    """Goes through the bytes."""

    def __init__(self, body: memoryview) -> None:
        self.body, self.place = body, 0

    def take(self, count: int) -> memoryview:
        part = self.body[self.place : self.place + count]
        if len(part) < count:
            raise ValueError(f"it ends {count - len(part)} bytes too soon for this network")
        self.place += count
        return part

    def varint(self) -> int:
        number = 0
        for k in range(_LONGEST):
            byte = self.take(1)[0]
            number |= (byte & 127) << 7 * k
            if byte < 128:
                return number
        raise ValueError("a number in it has no end")

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        part = bytes(self.take(math.prod(shape) * dtype.itemsize))
        if not part:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(_little(part, dtype.itemsize)), dtype=dtype).view(shape)
