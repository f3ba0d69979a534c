"""Golden vectors: the exact bits and weights of the formats, frozen. A failure here means files no longer read back.

`python -m tests.test_golden` writes them anew; allowed only together with a new format name (design 3).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rbe.formats import SeedSpec, trellis
from rbe.mixing import fmix32
from rbe.search import encode

GOLDEN = Path(__file__).parent / "golden" / "trellis.json"
CASES = [(16, w) for w in range(1, 9)] + [(12, 1), (12, 4), (12, 7), (14, 2), (14, 4), (14, 5)]


def words(w: int, window: int) -> list[int]:
    """The seeds of one block, from nothing but integers; the first words hold the extreme bit patterns."""
    mixed = fmix32(torch.arange(4 * w) + 1000 * window + w).tolist()
    pairs = [(high << 32 | low) - (high >> 31 << 64) for high, low in zip(mixed[::2], mixed[1::2], strict=True)]
    return ([0, -1] if w > 1 else [-(2**63)]) + pairs[2 if w > 1 else 1 :]


def matrix() -> torch.Tensor:
    """A matrix made of integers alone, every entry an exact float32."""
    i, j = torch.arange(40)[:, None], torch.arange(24)
    return (fmix32(i * 64 + j) % 513 - 256 + fmix32(i + 64 * j + 7777) % 513 - 256).float() / 128


def describe() -> dict[str, Any]:
    """Everything that is frozen, computed anew."""
    blocks = []
    for window, w in CASES:
        seeds = torch.tensor([words(w, window)])
        codes = trellis.generate(seeds, SeedSpec("trellis", (16, 16), bits=w / 2, window=window))
        blocks.append(
            {
                "window": window,
                "w": w,
                "multipliers": list(trellis.multipliers(window, w)),
                "seeds": seeds[0].tolist(),
                "windows": trellis.windows(seeds, window)[0].tolist(),
                "codes": codes[0].flatten().tolist(),
            }
        )
    m = encode(matrix(), bits=1.5, effort="fast", seed=5)
    encoded = {
        "bits": 1.5,
        "effort": "fast",
        "seed": 5,
        "rotation": list(m.spec.rotation),
        "scale": m.scale.item(),
        "seeds": m.seeds.tolist(),
    }
    return {"format": "trellis", "version": trellis.VERSION, "blocks": blocks, "encoded": encoded}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


def test_version_and_multipliers_are_the_frozen_ones(golden: dict[str, Any]) -> None:
    assert golden["version"] == trellis.VERSION == 1
    for block in golden["blocks"]:
        assert tuple(block["multipliers"]) == trellis.multipliers(block["window"], block["w"])


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"window {window}, w {w}" for window, w in CASES])
def test_seeds_give_the_frozen_windows_and_codes(golden: dict[str, Any], case: int) -> None:
    block = golden["blocks"][case]
    seeds = torch.tensor([block["seeds"]])
    assert trellis.windows(seeds, block["window"])[0].tolist() == block["windows"]
    codes = trellis.generate(seeds, SeedSpec("trellis", (16, 16), bits=block["w"] / 2, window=block["window"]))
    assert codes[0].flatten().tolist() == block["codes"]


def test_the_encoder_finds_the_frozen_seeds(golden: dict[str, Any]) -> None:
    expected = golden["encoded"]
    m = encode(matrix(), bits=expected["bits"], effort=expected["effort"], seed=expected["seed"])
    assert list(m.spec.rotation) == expected["rotation"]
    assert m.seeds.tolist() == expected["seeds"]
    assert m.scale.item() == pytest.approx(expected["scale"], rel=1e-6)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(
        json.dumps(describe(), indent=None, separators=(",", ":")).replace('{"window"', '\n{"window"') + "\n"
    )
