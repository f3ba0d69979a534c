"""The C++ kernels, tier by tier: codes are the definition's, tiers agree, products are as exact as float32."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from rbe import kernels
from rbe.formats import SeedSpec, trellis
from rbe.kernels import cpu, reference

TIERS = tuple(cpu.FUSED_ROWS)
CASES = [(w, window) for w in range(1, 9) for window in trellis.WINDOWS]
ONE = torch.tensor(1.0)


def random_seeds(spec: SeedSpec, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (spec.blocks, trellis.words(spec)), generator=generator)


def random_x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_tiers(x: Tensor, spec: SeedSpec, seeds: Tensor, activations: str) -> list[Tensor]:
    """The same product on every tier that this machine has."""
    products = []
    for name in filter(cpu.tier_available, TIERS):
        cpu.set_tier(name)
        products.append(kernels.seed_matmul(x, spec, seeds, torch.tensor(0.01), None, activations))
    cpu.set_tier("")
    return products


@pytest.mark.parametrize(("w", "window"), CASES)
def test_codes_equal_the_definition(tier: str, w: int, window: int) -> None:
    for shape in ((33, 100), (1, 17), (17, 1)):
        spec = SeedSpec("trellis", shape, bits=w / 2, window=window)
        seeds = random_seeds(spec, w)
        assert torch.equal(kernels.decode(spec, seeds, ONE, None), reference.decode(spec, seeds, ONE, None))


@pytest.mark.parametrize(("w", "window"), CASES)
def test_products_of_integers_are_exact(tier: str, w: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.FUSED_ROWS, tier, 1 << 30)
    spec = SeedSpec("trellis", (33, 100), bits=w / 2, window=window)
    seeds = random_seeds(spec, w)
    codes = reference.decode(spec, seeds, ONE, None, torch.float64)
    for batch in (1, 2, 3, 5, 16, 33):
        x = torch.randint(-120, 120, (batch, 100), generator=torch.Generator().manual_seed(batch)).float()
        x[:, 0] = 127  # then the one scale of an int8 row is 1
        assert torch.equal(kernels.seed_matmul(x, spec, seeds, ONE, None).double(), x.double() @ codes.T)
        assert torch.equal(kernels.seed_matmul(x, spec, seeds, ONE, None, "int8").double(), x.double() @ codes.T)


@pytest.mark.parametrize("w", [3, 4])
def test_long_sums_do_not_overflow(tier: str, w: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.FUSED_ROWS, tier, 1 << 30)
    spec = SeedSpec("trellis", (17, 40000), bits=w / 2)  # the sums of bytes alone pass 2^31
    seeds = random_seeds(spec, w)
    exact = 127 * reference.decode(spec, seeds, ONE, None, torch.float64).sum(1)
    for batch in (1, 5):
        y = kernels.seed_matmul(torch.full((batch, 40000), 127.0), spec, seeds, ONE, None, "int8")
        assert torch.equal(y, exact.float().expand(batch, -1))


@pytest.mark.parametrize("shape", [(1, 100), (100, 1), (17, 33), (384, 384), (100, 300), (48, 2100)])
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_tiers_agree_bit_for_bit(shape: tuple[int, int], activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TIERS:
        monkeypatch.setitem(cpu.FUSED_ROWS, name, 1 << 30)
    for w, batch in ((1, 3), (3, 2), (4, 1), (4, 13), (5, 2), (8, 4)):
        spec = SeedSpec("trellis", shape, bits=w / 2, rotation=(3, 5))
        products = on_tiers(random_x(batch, shape[1], seed=w), spec, random_seeds(spec, w), activations)
        assert all(torch.equal(products[0], other) for other in products[1:])


def worst(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).abs().max())


@pytest.mark.parametrize("rotation", [(0, 0), (3, 5)])
@pytest.mark.parametrize("rows_of_x", [1, 4, 200])
def test_float_products_are_as_exact_as_float32(tier: str, rotation: tuple[int, int], rows_of_x: int) -> None:
    spec = SeedSpec("trellis", (70, 700), bits=2, rotation=rotation)
    seeds, scale = random_seeds(spec), torch.tensor(0.007)
    dense = reference.decode(spec, seeds, scale, None, torch.float64)
    plain = random_x(rows_of_x, 700)
    lopsided = plain.clone()
    lopsided[:, 3] *= 1e6
    tiny, huge = plain * 1e-41, plain * 1e30  # denormals; near the largest
    for x in (plain, lopsided, tiny, huge):
        exact = x.double() @ dense.T
        naive = worst(reference.seed_matmul(x, spec, seeds, scale, None), exact)
        # The last term is one unit in the last place of the largest sum, or the smallest denormal.
        assert worst(kernels.seed_matmul(x, spec, seeds, scale, None), exact) <= 2 * naive + max(
            2**-24 * float(exact.abs().max()), 2**-148
        )


def test_zero_and_broken_rows_stay_in_their_rows(tier: str) -> None:
    spec = SeedSpec("trellis", (40, 100), bits=2, rotation=(3, 5))
    x = random_x(5, 100)
    x[1], x[2, 7], x[3, 9] = 0, torch.nan, -torch.inf
    for activations in ("float32", "int8"):
        y = kernels.seed_matmul(x, spec, random_seeds(spec), ONE, None, activations)
        assert torch.equal(y[1], torch.zeros(40))
        assert y[2].isnan().all() and y[3].isnan().all()
        assert y[[0, 4]].isfinite().all()


def test_int8_activations_cost_about_one_percent(tier: str) -> None:
    spec = SeedSpec("trellis", (384, 384), bits=2, rotation=(3, 5))
    seeds = random_seeds(spec)
    x = random_x(3, 384)
    exact = x.double() @ reference.decode(spec, seeds, ONE, None, torch.float64).T
    error = kernels.seed_matmul(x, spec, seeds, ONE, None, "int8") - exact
    assert 0.003 < float(error.norm() / exact.norm()) < 0.012


def test_many_rows_equal_few_rows(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SeedSpec("trellis", (70, 100), bits=1.5, rotation=(3, 5))
    seeds, x = random_seeds(spec), random_x(9, 100)
    monkeypatch.setitem(cpu.FUSED_ROWS, tier, 1 << 30)
    fused = kernels.seed_matmul(x, spec, seeds, ONE, None)
    monkeypatch.setitem(cpu.FUSED_ROWS, tier, 0)
    monkeypatch.setattr(cpu, "TILE", 800)  # bands of 32 rows
    assert torch.allclose(kernels.seed_matmul(x, spec, seeds, ONE, None), fused, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_the_number_of_threads_changes_nothing(activations: str) -> None:
    spec = SeedSpec("trellis", (500, 400), bits=2, rotation=(3, 5))
    seeds, x = random_seeds(spec), random_x(20, 400)
    matrix = cpu.native(spec, seeds, ONE, None)
    outputs = []
    for threads in (1, 2, 3):
        y = torch.empty(20, 500)
        matrix.matmul(x.data_ptr(), 20, y.data_ptr(), threads, activations == "int8")
        outputs.append(y)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_can_multiply() -> None:
    program = """
import os, signal, torch
from rbe.matrix import SeedMatrix
torch.set_num_threads(2)
m = SeedMatrix.from_seeds(torch.zeros(1024, 8, dtype=torch.int64), (512, 512), "trellis")
before = m.matmul(torch.ones(4, 512))
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(m.matmul(torch.ones(4, 512)), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_row_scale_multiplies_rows(tier: str) -> None:
    spec = SeedSpec("trellis", (70, 40), bits=2, rotation=(0, 5))
    seeds, x = random_seeds(spec), random_x(2, 40)
    row_scale = torch.rand(70, generator=torch.Generator().manual_seed(1)).half()
    row_scale[:3] = torch.tensor([0.0, 6e-8, -2.0])  # zero, a denormal half, a negative
    exact = reference.decode(spec, seeds, ONE, row_scale, torch.float64)
    assert torch.allclose(kernels.decode(spec, seeds, ONE, row_scale).double(), exact, rtol=1e-5, atol=1e-4)
    y = kernels.seed_matmul(x, spec, seeds, ONE, row_scale).double()
    assert torch.allclose(y, x.double() @ exact.T, rtol=1e-5, atol=1e-3)


def test_rows_are_the_rows_of_the_matrix(tier: str) -> None:
    spec = SeedSpec("trellis", (70, 100), bits=2, rotation=(0, 5))
    seeds = random_seeds(spec)
    row_scale = torch.rand(70, generator=torch.Generator().manual_seed(1)).half()
    index = torch.tensor([[0, 69, 5], [17, 17, 31]])
    dense = kernels.decode(spec, seeds, ONE, row_scale)
    assert torch.equal(kernels.rows(index, spec, seeds, ONE, row_scale), dense[index])
    assert kernels.rows(index[:0], spec, seeds, ONE, row_scale).shape == (0, 3, 100)


def test_the_environment_forces_a_lower_tier() -> None:
    for asked in TIERS:
        lower = [name for name in TIERS[: TIERS.index(asked) + 1] if cpu.tier_available(name)]
        command = [sys.executable, "-c", "from rbe import _cpu; print(_cpu.tier())"]
        run = subprocess.run(command, env={**os.environ, "RBE_TIER": asked}, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == lower[-1]


def test_a_tier_that_does_not_exist_is_refused() -> None:
    for asked, code in (("abacus", 1), ("", 0)):
        command = [sys.executable, "-c", "import rbe.kernels"]
        run = subprocess.run(command, env={**os.environ, "RBE_TIER": asked}, capture_output=True, text=True)
        assert run.returncode == code
        assert ("RBE_TIER=abacus" in run.stderr and ", ".join(TIERS) in run.stderr) == bool(code)
