"""What a seed matrix keeps: energy and efficiency from the index; errors, singular values and how stable it is, beside
the dense source."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rbe import checkpoint, metrics
from rbe.cli import show
from rbe.errors import RbeError
from rbe.matrix import SeedMatrix
from rbe.report import Table
from rbe.search import baselines
from rbe.source import open_source
from rbe.stability import Stability, stability


@dataclass(frozen=True)
class Kept:
    """What a matrix in seeds keeps of its dense source.

    Attributes:
        name: of the module.
        mse, mae: mean squared and mean absolute error of a weight.
        relative_error: norm of the error relative to that of the weights.
        error: its square.
        floor: the least `error` that any code of Gaussian weights can reach at the stored rate.
        captured_energy: 1 - error.
        efficiency: eta, the rate that the error needs at least, of the rate that is stored.
        spectral_error: of the sorted singular values, relative.
        principal: PCR_k, energy in the k largest singular values as a multiple of the source's.
        k: how many; 16, or all there are.
        lipschitz: (source, seeds) largest singular values.
        condition: (source, seeds) largest over smallest; None where singular values were estimated.
        uncertainty: what `spectral_error` may be off by; 0 where all is exact.
        peers: what the seeds, truncated SVD and DCT capture of it at as many bytes, beside the ceiling; None where
            singular values were estimated.
        stability: the Jacobian of the seeds and the rounding bounds; None where a seed has no radius and angle.
    """

    name: str
    mse: float
    mae: float
    relative_error: float
    error: float
    floor: float
    captured_energy: float
    efficiency: float
    spectral_error: float
    principal: float
    k: int
    lipschitz: tuple[float, float]
    condition: tuple[float, float] | None
    uncertainty: float
    peers: baselines.Comparison | None
    stability: Stability | None


def compare(folder: Path, source: Path, progress: Callable[[float, float, str], None] | None = None) -> dict[str, Kept]:
    """By module name, every seed matrix of a folder beside the weight it stands for.

    Raises:
        RbeError: a matrix is missing in the source, or has another shape there.
    """
    opened = checkpoint.open_tensors(folder)
    dense = open_source(source).tensors
    specs = checkpoint.specs(opened.config)
    found: dict[str, Kept] = {}
    for number, (module, (spec, entry)) in enumerate(specs.items()):
        if progress is not None:
            progress(number, len(specs), module)
        stored, sides = dense.get(checkpoint.weight_name(module, entry)), checkpoint.weight_sides(spec, entry)
        if stored is None or stored.shape != sides:
            raise RbeError(f"{source} has no {'x'.join(map(str, sides))} weight {module}; is it the source?")
        weight = checkpoint.as_matrix(stored.read(copy=False).float(), spec, entry["transposed"])
        found[module] = _kept(module, opened.matrix(module), weight)
    return found


def _kept(name: str, matrix: SeedMatrix, weight: Tensor) -> Kept:
    decoded = matrix.decode()
    ours, wanted = metrics.spectrum(decoded), metrics.spectrum(weight)
    exact = ours.error == wanted.error == 0.0
    k = min(16, len(wanted.values))
    error, rate = metrics.relative_squared_error(decoded, weight), matrix.bits_per_weight
    return Kept(
        name=name,
        mse=metrics.mean_squared_error(decoded, weight),
        mae=metrics.mean_absolute_error(decoded, weight),
        relative_error=metrics.relative_error(decoded, weight),
        error=error,
        floor=metrics.shannon_floor(rate),
        captured_energy=1.0 - error,
        efficiency=metrics.efficiency(error, rate),
        spectral_error=metrics.spectral_error(ours, wanted),
        principal=metrics.principal_ratio(ours, wanted, k),
        k=k,
        lipschitz=(wanted.values[0].item(), ours.values[0].item())
        if exact
        else (metrics.lipschitz(weight), metrics.lipschitz(decoded)),
        condition=(wanted.condition, ours.condition) if exact else None,
        uncertainty=ours.error + wanted.error,
        peers=baselines.compare(weight, decoded, matrix.nbytes) if exact else None,
        stability=stability(matrix),
    )


def compare_shown(folder: Path, source: Path, silent: bool) -> dict[str, Kept]:
    """`compare` with its progress on standard error."""
    with show.Steps("singular values", "matrices", silent=silent) as steps:
        return compare(folder, source, steps)


def plain(kept: Kept | None) -> dict[str, Any]:
    """What is known of a matrix beside its source, for machines; nothing where there was none."""
    return {} if kept is None else {"spectrum": asdict(kept)}


COLUMNS = ("floor", "captured", "eta")
LEGEND = (
    "error: squared, relative to the weights; floor: the least that any code of Gaussian weights can reach at the "
    "stored rate (Shannon), for which padding and scales are bits bought like any others; "
    "captured: energy kept, 1 - error; eta: rate that the error needs at least, of the rate that is stored"
)


def figures(row: checkpoint.Row) -> dict[str, float | None]:
    """Floor, captured energy and efficiency of a seed matrix, at the stored rate; None where the error is not known."""
    return {
        "floor": metrics.shannon_floor(row.rate),
        "captured_energy": row.captured,
        "efficiency": None if row.error is None else metrics.efficiency(row.error, row.rate),
    }


def columns(row: checkpoint.Row) -> tuple[str, str, str]:
    """The same, for people."""
    found = figures(row)
    captured, eta = found["captured_energy"], found["efficiency"]
    return (
        f"{found['floor']:.5f}",
        "?" if captured is None else f"{100 * captured:.2f} %",
        "?" if eta is None else f"{eta:.3f}",
    )


def tables(found: dict[str, Kept], source: str) -> list[Table]:
    """What is known of matrices beside their source, for `inspect --against` and the report."""
    every = found.values()
    made = [
        Table(
            f"errors beside {source}",
            ("tensor", "MSE", "MAE", "relative error", "captured", "floor", "eta"),
            [
                (
                    one.name,
                    f"{one.mse:.3e}",
                    f"{one.mae:.3e}",
                    f"{one.relative_error:.4f}",
                    f"{100 * one.captured_energy:.2f} %",
                    f"{one.floor:.5f}",
                    f"{one.efficiency:.3f}",
                )
                for one in every
            ],
            "MSE, MAE: mean squared and mean absolute error of a weight; relative error: norm of the error over that "
            "of the weights; captured: energy kept; floor: of the squared relative error, at the stored rate; eta: "
            "rate that the error needs at least, of the rate that is stored",
        )
    ]
    compared = [(one.name, one.peers) for one in every if one.peers is not None]
    if compared:
        made.append(
            Table(
                "energy kept at equal bytes",
                ("tensor", "bits/weight", "seeds", "ceiling", "SVD", "DCT"),
                [
                    (
                        name,
                        f"{p.bits:.3f}",
                        *(f"{100 * share:.2f} %" for share in (p.captured, p.ceiling, p.svd, p.dct)),
                    )
                    for name, p in compared
                ],
                "ceiling: 1 - 2^(-2 bits), of any code of Gaussian weights; SVD: the largest singular values in "
                "float16; DCT: the largest coefficients, positions counted",
            )
        )
    moved = [(one.name, one.stability) for one in every if one.stability is not None]
    if moved:
        made.append(
            Table(
                "how far seeds and rounding move weights",
                ("tensor", "Jacobian rank", "sigma max", "storage bound", "seed bound", "weight bound"),
                [
                    (name, str(s.rank), *(f"{v:.3e}" for v in (s.largest, s.storage, s.seed, s.weight)))
                    for name, s in moved
                ],
                "Jacobian: of (r, theta) -> block, where a block moves most, and its largest singular value; then the "
                "most that rounding r and theta to their fields moves a weight, and a block; and the most by which a "
                f"weight that is then computed in float32, in {max(s.operations for _, s in moved)} operations or "
                "less, differs from the exact one",
            )
        )
    made.append(
        Table(
            f"singular values beside {source}",
            ("tensor", "spectral error", "PCR_16", "Lipschitz constant", "condition"),
            [
                (
                    one.name,
                    f"{one.spectral_error:.4f}" + (f" +-{one.uncertainty:.3f}" if one.uncertainty else ""),
                    f"{one.principal:.4f}",
                    " -> ".join(f"{v:.4g}" for v in one.lipschitz),
                    "" if one.condition is None else " -> ".join(f"{v:.4g}" for v in one.condition),
                )
                for one in every
            ],
            "spectral error: of the sorted singular values; PCR_16: energy in the 16 largest, over the source's; "
            "then the largest one, and largest over smallest, source -> seeds",
        )
    )
    return made


def show_kept(found: dict[str, Kept], source: str) -> None:
    """The tables of `inspect --against`."""
    for table in tables(found, source):
        show.line("")
        show.table(table.title, table.names, table.rows)
        show.line(table.note)
