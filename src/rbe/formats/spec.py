"""What a seed matrix is, apart from its tensors: a frozen, printable, saveable value."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

from rbe.errors import RbeError

# (end, bits) of each grade of a matrix whose rows do not all have the same rate; the first begins at row 0.
Grades = tuple[tuple[int, float], ...]


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
        grades: trellis only: (end, bits) of the row ranges of a graded matrix, whose frequent rows have more bits;
            `bits` is then their mean. Empty where all rows have the same rate.
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
    grades: Grades = ()
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
        self._check_grades()
        line = (
            f"{self.format} {self.shape[0]} {self.shape[1]} {self.bits} {self.block} {self.window} {self.rotation[0]} "
            f"{self.rotation[1]} {self.mode} {self.precision} {self.stages}"
        )
        grades = ",".join(f"{end}:{bits!r}" for end, bits in self.grades)
        object.__setattr__(self, "text", f"{line} {grades}" if grades else line)

    def _check_grades(self) -> None:
        """Refuse row ranges that do not cover the rows in whole blocks, or whose mean is another rate."""
        if not self.grades:
            return
        for one in self.grades:
            if len(one) != 2 or type(one[0]) is not int or isinstance(one[1], bool) or not isinstance(one[1], float):
                raise RbeError(f"spec: grade {one!r} is no (end row, bits); both are numbers, such as (2048, 3.0)")
        ends = [end for end, _ in self.grades]
        for end in ends:
            if end <= 0:
                raise RbeError(f"spec: a grade ends at row {end}; it must end behind its first row")
        rising = all(a < b for a, b in zip([0, *ends], ends, strict=False))
        if not rising or ends[-1] != self.shape[0] or self.block is None or any(e % self.block for e in ends[:-1]):
            raise RbeError(
                f"spec: grades end at rows {ends}; they must rise in whole blocks of {self.block} up to the last row, "
                f"{self.shape[0]}"
            )
        if self.rotation[0]:
            raise RbeError("spec: grades need rows that stand alone, but the output side is rotated")
        if self.bits != mean_bits(self.grades, self.block):
            raise RbeError(
                f"spec: bits {self.bits} is not the mean of the grades {self.grades}, "
                f"{mean_bits(self.grades, self.block)}; let formats.make_spec fill it in"
            )

    @property
    def parts(self) -> Iterator[tuple[slice, "SeedSpec"]]:
        """(rows, specification) of every grade; one of all rows where the matrix is not graded.

        >>> grades = ((32, 3.0), (40, 1.0))
        >>> spec = SeedSpec("trellis", (40, 20), bits=mean_bits(grades, 16), grades=grades)
        >>> [(rows.start, rows.stop, part.bits) for rows, part in spec.parts]
        [(0, 32, 3.0), (32, 40, 1.0)]
        """
        if not self.grades:
            yield slice(0, self.shape[0]), self
            return
        start = 0
        for end, bits in self.grades:
            yield slice(start, end), replace(self, shape=(end - start, self.shape[1]), bits=bits, grades=())
            start = end

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
            RbeError: `bits` is another number, or the matrix is graded.
        """
        if self.grades:
            raise RbeError(f"{self.format}: grades {self.grades} are not offered; all rows have the rate of the block")
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
            **({"grades": [list(grade) for grade in self.grades]} if self.grades else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            RbeError: a key is missing, unknown or of the wrong type.
        """
        try:
            known = {**data, "shape": tuple(data["shape"]), "rotation": tuple(data.get("rotation", (0, 0)))}
            if "grades" in data:
                known["grades"] = tuple((end, float(bits)) for end, bits in data["grades"])
            return cls(**known)
        except (TypeError, KeyError, ValueError) as cause:
            raise RbeError(
                f"spec: {data!r} is no seed specification ({cause}); the file is damaged or newer"
            ) from cause


def mean_bits(grades: Grades, block: int) -> float:
    """Bits a weight of a graded matrix, over whole blocks.

    >>> mean_bits(((32, 3.0), (40, 1.0)), 16)
    2.3333333333333335
    """
    total, start = 0.0, 0
    for end, bits in grades:
        total += bits * -(-(end - start) // block)
        start = end
    return total / -(-start // block)
