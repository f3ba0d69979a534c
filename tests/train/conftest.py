"""A small problem for training runs."""

from pathlib import Path

import numpy as np
import pytest
from run_cases import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a small problem, four classes of bright quadrants, and a configuration for it."""
    rng = np.random.default_rng(0)

    def images(n: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, 4, n)
        x = rng.integers(0, 120, (n, side, side))
        half = side // 2
        for k in range(n):
            x[k, half * (y[k] // 2) :, half * (y[k] % 2) :][:half, :half] += 90
        return x.astype(np.uint8), y.astype(np.uint8)

    def make(text: str = "", side: int = 8) -> Path:
        parts = [*images(600, side), *images(200, side)]
        np.savez(tmp_path / "data.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), parts, strict=True)))
        path = tmp_path / "run.toml"
        base = "[data]\npath = 'data.npz'\nvalidation = 100\n"
        base += f"[model]\nwidths = [{side * side}, 32, 4]\n" if "[model]" not in text else ""
        path.write_text(base + text)
        return path

    return make
