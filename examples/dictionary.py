"""What each field of a seed does to a block: draws docs/dictionary.png.

python examples/dictionary.py [OUT]
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from rbe.formats import make_spec, packed64, packed128

EDGE = 32
# The seed that every row starts from and changes in one field.
START: dict[str, Any] = {"quadrant": 2, "hyp_freq": 1200, "geo_amp": 4095, "basis_sel": 3, "cordic_seq": 0}
POINT = {"radius": 0.6, "angle": 0.0}
ROWS: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    ("quadrant: f along the radius", "quadrant", [0, 1, 2, 3], {"basis_sel": 0}),
    ("hyp_freq: how steep f is", "hyp_freq", [1, 200, 600, 1200, 2400, 4095], {"quadrant": 3, "basis_sel": 0}),
    ("geo_amp: amplitude and sign", "geo_amp", [0, 1000, 2047, 2048, 3000, 4095], {"basis_sel": 1}),
    ("basis_sel: waves around the centre", "basis_sel", [0, 1, 2, 5, 16, 31, 32, 63], {}),
    ("cordic_seq: turns the block", "cordic_seq", [0, 1, 2, 4, 8, 0xFFFFF], {}),
    ("radius: zooms into f", "radius", [0.01, 0.1, 0.3, 0.6, 0.9, 0.99], {"quadrant": 3, "basis_sel": 2}),
    ("angle: turns the block", "angle", [0.0, 0.25, 0.5, 1.0, 2.0, 3.1], {}),
]


def block(mode: str, **fields: Any) -> torch.Tensor:
    """The block of one seed: (EDGE, EDGE)."""
    given = {**START, **POINT, **fields}
    code = packed128.code_of(**{name: torch.tensor([[given[name]]]) for name in START})
    radius, angle = (torch.tensor([[given[name]]], dtype=torch.float64) for name in POINT)
    return packed128.values(code, radius, angle, make_spec("packed128", (EDGE, EDGE), block=EDGE, mode=mode))[0]


def draw(axes: Any, w: torch.Tensor, title: str, top: float = 0.0) -> None:
    """Blue is negative, red positive; the colours reach to the largest weight, or to `top`."""
    top = top or max(w.abs().max().item(), 1e-12)
    axes.imshow(w.numpy(), cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    axes.set_title(title, fontsize=7, pad=2)
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])


def main(out: Path) -> None:
    columns = max(len(values) for _, _, values, _ in ROWS)
    figure = Figure(figsize=(1.15 * columns + 2.4, 1.3 * (len(ROWS) + 3)), layout="constrained")
    grid = figure.subplots(len(ROWS) + 3, columns)
    for axes in grid.flat:
        axes.set_axis_off()

    def name(row: int, text: str) -> None:
        grid[row, 0].text(-0.15, 0.5, text, transform=grid[row, 0].transAxes, ha="right", va="center", fontsize=8)

    for row, (title, field, values, fixed) in enumerate(ROWS):
        name(row, title)
        for column, value in enumerate(values):
            label = f"{field} {value:#x}" if field == "cordic_seq" else f"{field} {value:g}"
            top = 1.0 if field == "geo_amp" else 0.0
            draw(grid[row, column], block("radial", **{**fixed, field: value}), label, top)
    row = len(ROWS)
    name(row, "faithful mode: f is one\nnumber a block")
    for column, q in enumerate([0, 1, 2, 5, 16, 31, 32, 63]):
        draw(grid[row, column], block("faithful", basis_sel=q), f"basis_sel {q}")
    name(row + 1, "packed64: one fixed\npattern a stage")
    for stage in range(4):
        draw(grid[row + 1, stage], packed64.modulation(EDGE, EDGE, stage) - 1, f"phi - 1, stage {stage}")
    name(row + 2, "several stages summed")
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(EDGE, EDGE, dtype=torch.float64)
    for stage in range(columns):
        fields = {"quadrant": stage % 4, "basis_sel": int(torch.randint(0, 12, (1,), generator=generator))}
        total = total + block("radial", **fields, angle=stage * math.tau / 7) / (1 + stage)
        draw(grid[row + 2, stage], total, f"{stage + 1} stage{'s' if stage else ''}")
    figure.savefig(out, dpi=110, metadata={"Software": None})
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "dictionary.png")
