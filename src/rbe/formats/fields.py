"""Bit-field tables: a format's layout as data, from which pack, unpack and the documentation derive."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rbe.errors import RbeError

WORD_BITS = 64


@dataclass(frozen=True)
class Field:
    """One run of bits inside a 64-bit word."""

    name: str
    width: int
    meaning: str


@dataclass(frozen=True)
class Layout:
    """The words of one block, each a tuple of fields listed from the most significant bit down.

    >>> layout = Layout((( Field("hi", 32, "upper half"), Field("lo", 32, "lower half")),))
    >>> seeds = layout.pack({"hi": torch.tensor([1]), "lo": torch.tensor([2])})
    >>> seeds.tolist(), layout.unpack(seeds)["hi"].tolist()
    ([[4294967298]], [1])
    """

    words: tuple[tuple[Field, ...], ...]

    def __post_init__(self) -> None:
        for word in self.words:
            assert sum(f.width for f in word) == WORD_BITS, "the fields of a word must fill its 64 bits"
        names = [f.name for word in self.words for f in word]
        assert len(set(names)) == len(names), "field names must be unique"

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Pack unsigned field values into seeds.

        Args:
            values: for each field an int64 tensor (blocks,), values in [0, 2^width); a 64-bit field holds the word's
                bit pattern as int64.

        Returns:
            int64 (blocks, words).

        Raises:
            RbeError: a field is missing, unknown, out of range, or not an int64 tensor of the others' shape.
        """
        names = {f.name for word in self.words for f in word}
        if set(values) != names:
            raise RbeError(f"pack: fields {sorted(values)} given, this layout has exactly {sorted(names)}")
        shape = values[self.words[0][0].name].shape
        for name, v in values.items():
            if v.dtype != torch.int64 or v.shape != shape:
                raise RbeError(f"pack: field {name} is {v.dtype} {tuple(v.shape)}; all fields are int64 {tuple(shape)}")
        packed = []
        for word in self.words:
            total = torch.zeros_like(values[word[0].name])
            for f in word:
                v = values[f.name]
                if f.width < WORD_BITS and bool(((v < 0) | (v >> f.width != 0)).any()):
                    raise RbeError(f"pack: field {f.name} has a value outside [0, 2^{f.width}); clamp or mask it first")
                total = v if f.width == WORD_BITS else (total << f.width) | v
            packed.append(total)
        return torch.stack(packed, dim=-1)

    def unpack(self, seeds: Tensor) -> dict[str, Tensor]:
        """Split seeds int64 (blocks, words) into their fields, each int64 (blocks,)."""
        if seeds.dtype != torch.int64 or seeds.ndim != 2 or seeds.shape[1] != len(self.words):
            raise RbeError(
                f"unpack: seeds are {seeds.dtype} {tuple(seeds.shape)}, "
                f"this layout has int64 (blocks, {len(self.words)})"
            )
        out = {}
        for column, word in enumerate(self.words):
            low = WORD_BITS
            for f in word:
                low -= f.width
                shifted = seeds[:, column] >> low  # arithmetic: torch has no unsigned shift on CPU, so mask afterwards
                out[f.name] = shifted if f.width == WORD_BITS else shifted & ((1 << f.width) - 1)
        return out

    def table(self) -> str:
        """The layout as a Markdown table."""
        rows = ["| word | bits | field | meaning |", "|---|---|---|---|"]
        for index, word in enumerate(self.words):
            high = WORD_BITS
            for f in word:
                rows.append(f"| {index} | [{high - 1}:{high - f.width}] | {f.name} | {f.meaning} |")
                high -= f.width
        return "\n".join(rows)


def split_floats(word: Tensor) -> tuple[Tensor, Tensor]:
    """The two float32 numbers of a word int64 (...): bits [63:32] and [31:0], (...) each."""
    halves = torch.stack([word >> 32, word], -1).to(torch.int32).view(torch.float32)
    return halves[..., 0].contiguous(), halves[..., 1].contiguous()


def join_floats(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of `split_floats`: float32 (...), (...) to int64 (...)."""
    upper, lower = (part.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF for part in (high, low))
    return (upper << 32) | lower


def check_parts(format: str, parts: dict[str, Tensor], shape: tuple[int, ...], code: Tensor | None = None) -> None:
    """Refuse parts of seeds that are not of one shape, and discrete bits that are not int64 of it.

    Raises:
        RbeError: a part has another shape or dtype.
    """
    if any(part.shape != shape for part in parts.values()):
        given = ", ".join(str(tuple(part.shape)) for part in parts.values())
        raise RbeError(f"{format}: {' and '.join(parts)} are of shapes {given}; a seed has one each: give {shape}")
    if code is not None and (code.dtype != torch.int64 or code.shape != shape):
        raise RbeError(f"{format}: the code is {code.dtype} {tuple(code.shape)}; it must be int64 {shape}")
