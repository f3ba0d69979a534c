"""What a seed matrix is, apart from its tensors: a frozen, printable, saveable value."""

from dataclasses import dataclass, field
from typing import Any, Self

from rbe.errors import RbeError


@dataclass(frozen=True)
class SeedSpec:
    """Everything but the tensors that is needed to generate a matrix from its seeds.

    >>> spec = SeedSpec("trellis", (40, 33), bits=2.0)
    >>> spec.grid, spec.padded
    ((3, 3), (48, 48))
    >>> SeedSpec.from_json(spec.to_json()) == spec
    True

    Attributes:
        format: name of the format.
        shape: (rows, columns) of the matrix, rows being outputs as in torch.
        bits: nominal rate of the seeds, in bits per weight.
        block: edge of a block; None makes the whole matrix one block (packed64 and packed128).
        window: trellis only, bits a weight sees of its ring.
        rotation: (out, in) 32-bit seeds of the Hadamard rotations of the two sides; 0 is no rotation.
        mode: variant of the generator, where the format has several.
        precision: packed64 only, bits of a fixed-point number, 32 or 64.
        stages: seeds summed in every block (packed64 and packed128).
        text: all of these in one line, as the operations take them.
    """

    format: str
    shape: tuple[int, int]
    bits: float
    block: int | None = 16
    window: int = 16
    rotation: tuple[int, int] = (0, 0)
    mode: str | None = None
    precision: int = 32
    stages: int = 1
    # Made here once: torch.compile cannot print numbers that differ among the layers it has seen.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole = {"block": self.block, "window": self.window, "precision": self.precision, "stages": self.stages}
        for name, value in whole.items():
            if type(value) is not int and not (name == "block" and value is None):
                raise RbeError(f"spec: {name} {value!r} is not an int")
        if not isinstance(self.bits, int | float):
            raise RbeError(f"spec: bits {self.bits!r} is not a number")
        if len(self.shape) != 2 or not all(type(side) is int and side > 0 for side in self.shape):
            raise RbeError(
                f"spec: shape {tuple(self.shape)} is not two positive sides; a seed matrix is 2-D and not empty"
            )
        if self.block is not None and self.block < 1:
            raise RbeError(f"spec: block {self.block} is not positive; the usual edge is 16")
        if self.stages < 1:
            raise RbeError(f"spec: stages {self.stages} is not positive; one seed a block is the least")
        if len(self.rotation) != 2 or not all(type(s) is int and 0 <= s < 1 << 32 for s in self.rotation):
            raise RbeError(f"spec: rotation {self.rotation} must be two unsigned 32-bit seeds (out, in); 0 is none")
        line = (
            f"{self.format} {self.shape[0]} {self.shape[1]} {self.bits} {self.block} {self.window} {self.rotation[0]} "
            f"{self.rotation[1]} {self.mode} {self.precision} {self.stages}"
        )
        object.__setattr__(self, "text", line)

    @property
    def block_shape(self) -> tuple[int, int]:
        """(rows, columns) of a block."""
        return self.shape if self.block is None else (self.block, self.block)

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns); blocks are stored in row-major order of this grid."""
        (rows, columns), (height, width) = self.shape, self.block_shape
        return -(-rows // height), -(-columns // width)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.grid[0] * self.grid[1]

    @property
    def padded(self) -> tuple[int, int]:
        """Shape after padding both sides at the end to whole blocks."""
        return self.grid[0] * self.block_shape[0], self.grid[1] * self.block_shape[1]

    def check_rate(self, words: int) -> None:
        """Refuse a nominal rate that is not what `words` 64-bit words a block come to.

        Raises:
            RbeError: `bits` is another number.
        """
        height, width = self.block_shape
        expected = 64.0 * words / (height * width)
        if self.bits != expected:
            raise RbeError(
                f"{self.format}: {self.bits:g} bits per weight do not fit {words} words a {height}x{width} block, "
                f"which are {expected:g}; let formats.make_spec fill in the rate"
            )

    def to_json(self) -> dict[str, Any]:
        """A dictionary that survives JSON."""
        return {
            "format": self.format,
            "shape": list(self.shape),
            "bits": self.bits,
            "block": self.block,
            "window": self.window,
            "rotation": list(self.rotation),
            "mode": self.mode,
            "precision": self.precision,
            "stages": self.stages,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            RbeError: a key is missing, unknown or of the wrong type.
        """
        try:
            known = {**data, "shape": tuple(data["shape"]), "rotation": tuple(data.get("rotation", (0, 0)))}
            return cls(**known)
        except (TypeError, KeyError) as cause:
            raise RbeError(
                f"spec: {data!r} is no seed specification ({cause}); the file is damaged or newer"
            ) from cause
