"""Peers on this machine: ggml's quantisation types, error and dot-product speed, on the same Gaussian weights.

ggml is no dependency: build its shared libraries from the source package of llama-cpp-python (target `ggml`), then

    python -m benchmarks.peers FOLDER_WITH_LIBGGML

Prints, per type: bits per weight with scales, relative squared error, Shannon floor at that rate, encode speed, and
billions of weights per second of ggml's own row dot product on one core (int8 activations, data in cache).
"""

import argparse
import ctypes
import statistics
import time
from pathlib import Path

import numpy as np

TYPES = {
    "Q8_0": 8, "Q4_K": 12, "IQ4_XS": 23, "Q4_0": 2, "Q3_K": 11, "IQ3_S": 21, "IQ3_XXS": 18, "Q2_K": 10,
    "IQ2_S": 22, "IQ2_XS": 17, "IQ2_XXS": 16, "TQ2_0": 35, "IQ1_M": 29, "IQ1_S": 19, "BF16": 30, "F32": 0,
}  # fmt: skip
COLUMNS = 4096
ROWS = 24
# One long row hides the cost of calling through ctypes.
DOT_COLUMNS = 1 << 19


class Traits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float", ctypes.c_void_p),
    )


class CpuTraits(ctypes.Structure):
    """`struct ggml_type_traits_cpu`."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("rows", ctypes.c_int64),
    )


CONVERT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
DOT = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
    ctypes.c_size_t, ctypes.c_int,
)  # fmt: skip


class Ggml:
    """The two libraries and the few functions measured here."""

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self.base.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
        self.cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(CpuTraits)
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.base.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p,
        ]  # fmt: skip
        self.cpu.ggml_cpu_init()

    def quantize(self, kind: int, w: np.ndarray) -> np.ndarray:
        """Bytes of a float32 (rows, columns) matrix in a type, uniform importance."""
        traits = self.base.ggml_get_type_traits(kind).contents
        out = np.empty(w.size // traits.block * traits.size, np.uint8)
        importance = np.ones(w.shape[1], np.float32)
        self.base.ggml_quantize_chunk(
            kind, w.ctypes.data, out.ctypes.data, 0, w.shape[0], w.shape[1], importance.ctypes.data
        )
        return out

    def dequantize(self, kind: int, packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The float32 matrix that the bytes stand for."""
        if kind == TYPES["F32"]:
            return packed.view(np.float32).reshape(shape)
        out = np.empty(shape, np.float32)
        CONVERT(self.base.ggml_get_type_traits(kind).contents.to_float)(packed.ctypes.data, out.ctypes.data, out.size)
        return out

    def dot_speed(self, kind: int, w: np.ndarray) -> float:
        """Billions of weights per second of ggml's dot product of one long row, on one core."""
        traits = self.cpu.ggml_get_type_traits_cpu(kind).contents
        row = self.quantize(kind, w)
        x = np.random.default_rng(1).standard_normal(w.size).astype(np.float32)
        other = self.base.ggml_get_type_traits(traits.vec_dot_type).contents
        packed = np.empty(w.size // other.block * other.size, np.uint8)
        if traits.vec_dot_type == TYPES["F32"]:
            packed = x
        else:
            from_float = self.cpu.ggml_get_type_traits_cpu(traits.vec_dot_type).contents.from_float
            CONVERT(from_float)(x.ctypes.data, packed.ctypes.data, x.size)
        result = np.zeros(1, np.float32)
        dot = DOT(traits.vec_dot)

        def run() -> None:
            dot(w.size, result.ctypes.data, 0, row.ctypes.data, 0, packed.ctypes.data, 0, 1)

        run()
        exact = float(self.dequantize(kind, row, w.shape).ravel().astype(np.float64) @ x)
        spread = float(np.linalg.norm(w) * np.linalg.norm(x) / np.sqrt(w.size))
        assert abs(result[0] - exact) < 0.1 * spread, "the peer's product does not match its own weights: not timed"
        times = []
        for _ in range(60):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return w.size / statistics.median(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with libggml-base.so and libggml-cpu.so")
    ggml = Ggml(parser.parse_args().folder)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    long = np.tile(w.ravel(), DOT_COLUMNS // w.size + 1)[None, :DOT_COLUMNS].copy()
    print("| type | bits | rel. squared error | 2^(-2R) | encode M weights/s | dot product G weights/s, one core |")
    print("|---|---|---|---|---|---|")
    for name, kind in TYPES.items():
        start = time.perf_counter()
        packed = ggml.quantize(kind, w)
        seconds = time.perf_counter() - start
        bits = 8 * packed.size / w.size
        error = float(((ggml.dequantize(kind, packed, w.shape) - w) ** 2).sum() / (w**2).sum())
        speed = ggml.dot_speed(kind, long)
        print(
            f"| {name} | {bits:.2f} | {error:.5f} | {4**-bits:.5f} | {w.size / seconds / 1e6:.2f} | {speed:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
