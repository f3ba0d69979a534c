"""The file of a trained network: its tensors one after the other, and nothing that the configuration says already.

    "rbe1" | CRC-32 of what follows, uint32 | number of exceptions | exceptions | tensors

Numbers are varints: seven bits a byte, the lowest first, the eighth set where more follow. An exception is a tensor
whose dtype is not the expected one: its place, then its dtype as a place in `DTYPES`. Tensors are in the order of the
state dict, in little-endian rows; only those of streams are preceded by their length in bytes.
"""

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

MAGIC = b"rbe1"
DTYPES = (torch.float32, torch.float16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
# The length of these is known only to the file.
_STREAM = ".seed"


def write(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bytes:
    """The file of the tensors that `rbe.nn.pack` made.

    >>> tensors = {"0.seed": torch.arange(5, dtype=torch.uint8), "0.scale": torch.tensor(0.5)}
    >>> len(write(tensors, tensors)), read(write(tensors, tensors), tensors)["0.seed"].tolist()
    (19, [0, 1, 2, 3, 4])

    Args:
        tensors: by name.
        expected: the same names with the shapes and dtypes that a fresh network of the configuration has.
    """
    assert list(tensors) == list(expected)
    odd = [k for k, (name, tensor) in enumerate(tensors.items()) if tensor.dtype != expected[name].dtype]
    parts = [_varint(len(odd)), *(_varint(k) for k in odd)]
    parts += [_varint(DTYPES.index(list(tensors.values())[k].dtype)) for k in odd]
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().numpy().tobytes()
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
    odd = [reader.varint() for _ in range(min(reader.varint(), len(expected)))]
    dtypes = {k: DTYPES[reader.varint() % len(DTYPES)] for k in odd}
    out = {}
    for k, (name, like) in enumerate(expected.items()):
        dtype = dtypes.get(k, like.dtype)
        shape = (reader.varint(),) if _is_stream(name) else tuple(like.shape)
        out[name] = reader.tensor(dtype, shape)
    if reader.place != len(body):
        raise ValueError(f"it has {len(body) - reader.place} bytes that this network has no place for")
    return out


def _is_stream(name: str) -> bool:
    return f".{name}".endswith(_STREAM)


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
        for k, byte in enumerate(self._bytes()):
            number |= (byte & 127) << 7 * k
            if byte < 128 or k > 8:
                break
        return number

    def _bytes(self) -> Iterator[int]:
        while True:
            yield self.take(1)[0]

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        like = np.dtype(torch.empty(0, dtype=dtype).numpy().dtype)
        count = int(np.prod(shape, dtype=np.int64))
        part = self.take(count * like.itemsize)
        return torch.from_numpy(np.frombuffer(part, like).copy()).view(shape)
