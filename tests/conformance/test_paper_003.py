"""Poincare-ball learning (003): the printed formulas in plain numpy, beside what is implemented and what is wrong."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rbe import formats, optim
from rbe.formats import SeedSpec, packed128

BASIS: list[Callable[[Any], Any]] = [np.sinh, np.cosh, np.tanh, lambda x: 1 / np.cosh(x) ** 2]
SLOPE: list[Callable[[Any], Any]] = [
    np.cosh,
    np.sinh,
    lambda x: 1 - np.tanh(x) ** 2,
    lambda x: -2 * np.tanh(x) / np.cosh(x) ** 2,
]


def steps(sequence: int, x: float, y: float) -> tuple[float, float]:
    """4.2.2: the product of the printed matrices J_k, and tanh(R)/R where every fourth radius is 1 or more."""
    for k in range(20):
        d = 1 if sequence >> k & 1 else -1
        x, y = x - d * 2.0**-k * y, y + d * 2.0**-k * x
        r = math.hypot(x, y)
        if k % 4 == 3 and r >= 1:
            x, y = x * math.tanh(r) / r, y * math.tanh(r) / r
    return x, y


def cell_angle(i: int, j: int, size: int) -> float:
    return math.atan2(2 * i / (size - 1) - 1, 2 * j / (size - 1) - 1)


def generate_weight(f: dict[str, int], r: float, theta: float, i: int, j: int, size: int) -> float:
    """4.5.1, with the four functions that it leaves undefined taken from the same author's chapter on decoding."""
    a = cell_angle(i, j, size)
    x, y = steps(f["cordic_seq"], r * math.cos(a + theta), r * math.sin(a + theta))
    value = BASIS[f["quadrant"]](f["hyp_freq"] / 4095 * 10 * math.hypot(x, y))
    s, angle = f["basis_sel"], math.atan2(y, x)
    modulation = 1.0 if s == 0 else math.cos(s * angle) if s < 32 else math.sin(s * angle)
    return float((f["geo_amp"] / 4095 * 2 - 1) * value * modulation)


FIELDS = {"quadrant": 2, "hyp_freq": 700, "geo_amp": 3000, "basis_sel": 5, "cordic_seq": 0xA5C3F}
SIZE = 6


def block(f: dict[str, int], r: float, theta: float) -> np.ndarray[Any, Any]:
    return np.array([[generate_weight(f, r, theta, i, j, SIZE) for j in range(SIZE)] for i in range(SIZE)])


def ours(f: dict[str, int], r: float, theta: float, mode: str = "faithful") -> tuple[torch.Tensor, SeedSpec]:
    """The code word of the fields, as the printed extraction (hi >> 62 and so on) reads it."""
    hi = f["quadrant"] << 62 | f["hyp_freq"] << 50 | f["geo_amp"] << 38 | f["basis_sel"] << 32 | f["cordic_seq"]
    code = torch.tensor([[hi - (1 << 64) if hi >= 1 << 63 else hi]])
    return code, formats.make_spec("packed128", (SIZE, SIZE), block=SIZE, mode=mode)


def points(r: float, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[r]], dtype=torch.float64), torch.tensor([[theta]], dtype=torch.float64)


@pytest.mark.parametrize("quadrant", range(4))
@pytest.mark.parametrize("q", [0, 1, 31, 32, 63])
def test_the_printed_algorithm_is_the_faithful_mode(quadrant: int, q: int) -> None:
    """4.5.1 equals packed128 in mode faithful, below and above the jump of the clamp."""
    for r, theta in ((0.3, 0.4), (0.58, -9.0), (0.7, 2.5), (0.99, 30.0)):
        f = {**FIELDS, "quadrant": quadrant, "basis_sel": q}
        code, spec = ours(f, r, theta)
        found = packed128.values(code, *points(r, theta), spec)[0].numpy()
        np.testing.assert_allclose(found, block(f, r, theta), rtol=1e-9, atol=1e-12)


def test_circular_steps_have_gain_1_646760_and_condition_1_whatever_the_bits() -> None:
    """4.2.2: the printed Jacobian is a turn and a stretch, so the threshold C_max = 1000 can never be reached."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        product = np.eye(2)
        for k in range(20):
            d = draw.choice([-1.0, 1.0])
            product = np.array([[1, -d * 2.0**-k], [d * 2.0**-k, 1]]) @ product
        assert np.linalg.cond(product) == pytest.approx(1.0, abs=1e-12)
        assert np.linalg.norm(product, 2) == pytest.approx(1.646760, abs=1e-6)
    assert pytest.approx(1.646760, abs=1e-6) == packed128.GAIN


def test_hyperbolic_steps_from_zero_are_singular() -> None:
    """4.2.2 calls the steps hyperbolic; with k = 0 the first one forgets everything but one number."""
    for d in (-1, 1):
        assert np.linalg.det(np.array([[1, d], [d, 1]])) == 0.0
    ks = sorted([*range(1, 20), 4, 13])
    assert math.prod(math.sqrt(1 - 4.0**-k) for k in ks) == pytest.approx(0.828159, abs=1e-6)
    assert sum(math.atanh(2.0**-k) for k in ks) == pytest.approx(1.1182, abs=1e-4)


def test_the_final_radius_ignores_place_angle_and_bits() -> None:
    """4.2.3: so f(r_final) is one number a block, and the derivative of r_final by theta is 0."""
    draw = np.random.default_rng(1)
    for r in (0.2, 0.61, 0.9):
        radii = [
            math.hypot(*steps(int(draw.integers(1 << 32)), r * math.cos(a), r * math.sin(a)))
            for a in draw.uniform(-9, 9, 60)
        ]
        assert max(radii) - min(radii) < 1e-14


def test_the_sequence_is_one_phase() -> None:
    """4.2.3: 20 bits do what one addition to theta does."""
    other = {**FIELDS, "cordic_seq": 0x13579}
    shift = sum(
        (2 * (FIELDS["cordic_seq"] >> k & 1) - 2 * (other["cordic_seq"] >> k & 1)) * math.atan(2.0**-k)
        for k in range(20)
    )
    np.testing.assert_allclose(block(FIELDS, 0.4, 0.3), block(other, 0.4, 0.3 + shift), atol=1e-12)


def test_a_block_without_modulation_is_constant_and_any_other_constant_along_rays() -> None:
    """4.2.1: position enters through M alone."""
    flat = block({**FIELDS, "basis_sel": 0}, 0.4, 0.3)
    np.testing.assert_allclose(flat, flat[0, 0], rtol=1e-12)
    wavy = block(FIELDS, 0.4, 0.3)
    for i, j in itertools.product(range(SIZE // 2), repeat=2):
        # A cell and its image through the centre have opposite directions; two cells of one diagonal the same.
        if i == j:
            assert wavy[i, i] == pytest.approx(wavy[0, 0], abs=1e-12)
    assert np.ptp(wavy) > 0.1


def test_radial_mode_depends_on_the_place_through_the_radius_too() -> None:
    code, spec = ours({**FIELDS, "basis_sel": 0}, 0.4, 0.3, mode="radial")
    found = packed128.values(code, *points(0.4, 0.3), spec)[0]
    assert float(found.max() - found.min()) > 0.1 and found[0, 0] != found[2, 2]


@pytest.mark.parametrize("quadrant", range(4))
def test_derivatives_of_the_basis_and_the_wrong_one(quadrant: int) -> None:
    """4.2.3: the table holds but for the second derivative of sech^2, which is 2 sech^2 (3 tanh^2 - 1)."""
    x, h = np.linspace(-2, 2, 41), 1e-4
    f = BASIS[quadrant]
    first, second = (f(x + h) - f(x - h)) / (2 * h), (f(x + h) - 2 * f(x) + f(x - h)) / h**2
    t, s = np.tanh(x), 1 / np.cosh(x) ** 2
    printed = [np.sinh(x), np.cosh(x), -2 * t * s, 2 * s * (2 * t**2 - 1)][quadrant]
    np.testing.assert_allclose(first, SLOPE[quadrant](x), atol=1e-6)
    found = packed128.basis(torch.tensor(quadrant), torch.from_numpy(x))
    np.testing.assert_allclose(found[1], first, atol=1e-6)
    np.testing.assert_allclose(found[2], second, atol=1e-6)
    if quadrant < 3:
        np.testing.assert_allclose(second, printed, atol=1e-6)
    else:
        at = np.tanh(0.8), 1 / np.cosh(0.8) ** 2
        assert 2 * at[1] * (2 * at[0] ** 2 - 1) == pytest.approx(-0.132, abs=1e-3)
        assert float(packed128.basis(torch.tensor(3), torch.tensor(0.8).double())[2]) == pytest.approx(0.361, abs=1e-3)


def test_the_printed_gradient_lacks_factors() -> None:
    """4.2.3, 4.3.1: A f'(R) dR/dr forgets alpha and M, and leaves theta no gradient at all."""
    r, theta, h = 0.4, 0.3, 1e-6
    by_r = (block(FIELDS, r + h, theta) - block(FIELDS, r - h, theta)) / (2 * h)
    by_theta = (block(FIELDS, r, theta + h) - block(FIELDS, r, theta - h)) / (2 * h)
    gain = packed128.GAIN
    printed = (FIELDS["geo_amp"] / 4095 * 2 - 1) * SLOPE[2](gain * r) * gain
    assert np.abs(by_r - printed).max() > 0.3 * np.abs(by_r).max()
    assert np.abs(by_theta).max() > 0.1
    code, spec = ours(FIELDS, r, theta)
    d_r, d_theta = packed128.derivatives(code, *points(r, theta), spec)
    np.testing.assert_allclose(d_r[0, 0], by_r, atol=1e-7)
    np.testing.assert_allclose(d_theta[0, 0], by_theta, atol=1e-7)


def test_the_chain_rule_has_the_input_once() -> None:
    """4.3.1: dy_i/dW_ij is x_j already, so dL/dr = sum delta_i x_j dW_ij/dr; printed with another x_j."""
    draw = np.random.default_rng(2)
    x, wanted = draw.normal(size=SIZE), draw.normal(size=SIZE)

    def loss(r: float) -> float:
        return float(((block(FIELDS, r, 0.3) @ x - wanted) ** 2).sum())

    numeric = (loss(0.4 + 1e-6) - loss(0.4 - 1e-6)) / 2e-6
    delta = 2 * (block(FIELDS, 0.4, 0.3) @ x - wanted)
    code, spec = ours(FIELDS, 0.4, 0.3)
    slope = packed128.derivatives(code, *points(0.4, 0.3), spec)[0][0, 0].numpy()
    assert delta @ slope @ x == pytest.approx(numeric, rel=1e-6)
    assert delta @ slope @ x**2 != pytest.approx(numeric, rel=0.05)


def test_transitions_are_flips_of_one_bit() -> None:
    """4.3.2.2: the table's neighbours differ in one bit; the algorithm of 4.5.2 tries all three others."""
    table = {0b00: {0b01, 0b10}, 0b01: {0b00, 0b11}, 0b10: {0b11, 0b00}, 0b11: {0b10, 0b01}}
    for state, neighbours in table.items():
        assert neighbours == {state ^ 1, state ^ 2}


def test_the_printed_transition_prefers_the_worse_state() -> None:
    """4.5.2 stores loss now minus loss then, 4.5.3 takes exp(-that / T); 4.3.2.2 has the sign right."""
    now, better, worse, temperature = 1.0, 0.5, 2.0, 1.0
    printed = {other: math.exp(-(now - other) / temperature) for other in (better, worse)}
    right = {other: math.exp(-(other - now) / temperature) for other in (better, worse)}
    assert printed[worse] > printed[better] and right[better] > right[worse]


def test_the_size_of_the_discrete_search() -> None:
    """4.3.2.3: quadrant, frequency and amplitude are 26 bits; K = 16 states have 416 neighbours a round."""
    widths = {f.name: f.width for f in packed128.LAYOUT.words[0]}
    bits = widths["quadrant"] + widths["hyp_freq"] + widths["geo_amp"]
    assert 2**bits == 4 * 4096 * 4096 == 67_108_864 and 16 * bits == 416


def test_wrapping_by_twenty_pi_keeps_every_weight() -> None:
    """4.4.1: the period divides 20 pi, so wrap changes no weight; clip(r) does, and is the nearest point."""
    theta = 100.0
    wrapped = float(optim.wrap(torch.tensor(theta, dtype=torch.float64)))
    assert -10 * math.pi <= wrapped < 10 * math.pi
    np.testing.assert_allclose(block(FIELDS, 0.4, wrapped), block(FIELDS, 0.4, theta), atol=1e-10)


def test_clipped_components_never_reach_the_norm() -> None:
    """4.4.2: after clipping both components to 0.1 the norm is at most 0.142, so C_max = 1 does nothing."""
    assert math.hypot(0.1, 0.1) < 0.142 < 1.0


def test_the_entropy_term_has_the_wrong_sign() -> None:
    """4.4.3: added to a loss, -lambda sum p log p is largest for equal use of the states, so it fights variety."""

    def term(p: list[float]) -> float:
        return -sum(v * math.log(v) for v in p if v > 0)

    assert term([0.25] * 4) > term([0.7, 0.1, 0.1, 0.1]) > term([1.0]) == 0.0


def test_no_printed_rate_meets_the_printed_conditions() -> None:
    """4.6.1 wants sum a = inf and sum a^2 < inf: exponent 0.5 fails the second, exponential decay the first."""
    power = [optim.PowerDecay(100.0, 0.5)(t) ** 2 for t in range(400_000)]
    # The sum of squares grows by the same amount with every doubling.
    growth = [sum(power[n : 2 * n]) for n in (50_000, 100_000, 200_000)]
    assert growth[2] == pytest.approx(growth[1], rel=1e-2) == pytest.approx(growth[0], rel=1e-2)
    assert sum(0.99**t for t in range(100_000)) == pytest.approx(100.0)
    better = [optim.PowerDecay(100.0, 0.75)(t) for t in range(400_000)]
    assert sum(v * v for v in better[200_000:]) < 0.8 * sum(v * v for v in better[100_000:200_000])
    assert sum(better[200_000:]) > 1.1 * sum(better[100_000:200_000])


def test_four_by_two_blocks_are_no_64_to_1() -> None:
    """4.6.3: 4x2 blocks of a 256x128 matrix are 1024:1; 64:1 and 1.56 % are blocks of 16x16."""
    weights = 256 * 128
    assert 4 * weights / (4 * 2 * 16) == 1024
    spec = formats.make_spec("packed128", (256, 128))
    assert 4 * weights / (16 * spec.blocks) == 64 and pytest.approx(0.0156, abs=1e-4) == 1 / 64
    shapes = [(256, 784), (128, 256), (10, 128)]
    seeds = sum(formats.make_spec("packed128", shape).blocks for shape in shapes)
    dense = 4 * sum(r * c for r, c in shapes)
    biases = 4 * (256 + 128 + 10)
    assert (seeds, 16 * seeds) == (920, 14_720)
    assert dense / (16 * seeds) == pytest.approx(63.8, abs=0.05)
    assert (dense + biases) / (16 * seeds + biases) == pytest.approx(57.7, abs=0.1)


def test_an_image_of_cifar_does_not_enter_the_printed_network() -> None:
    """4.6.3: 32x32x3 = 3072 inputs, the network has 784."""
    assert 32 * 32 * 3 == 3072 != 784


def test_no_amplitude_is_zero_and_frequency_zero_is_dead() -> None:
    """4.5.1: an odd number of steps has none in the middle; alpha = 0 makes sinh and tanh, and their gradient, 0."""
    assert min(abs(2 * a / 4095 - 1) for a in range(4096)) == pytest.approx(1 / 4095)
    assert math.sinh(10 * 0.92) > 4.9e3
    for quadrant in (0, 2):
        dead = {**FIELDS, "quadrant": quadrant, "hyp_freq": 0}
        code, spec = ours(dead, 0.4, 0.3)
        assert not packed128.values(code, *points(0.4, 0.3), spec).any()
        assert not any(d.any() for d in packed128.derivatives(code, *points(0.4, 0.3), spec))
        code, spec = ours(dead, 0.4, 0.3, mode="radial")
        assert packed128.values(code, *points(0.4, 0.3), spec).abs().max() > 0.01


def test_a_side_of_one_has_coordinate_zero() -> None:
    """4.5.1 divides by 0 for biases; they are columns."""
    spec = formats.make_spec("packed128", (5, 1), block=None)
    code = ours(FIELDS, 0.4, 0.3)[0]
    assert bool(packed128.values(code, *points(0.4, 0.3), spec).isfinite().all())


def test_fields_of_the_paper_are_64_bits_and_two_floats() -> None:
    """4.1.2: hi and lo; three formats that the papers call by one or two names are three here."""
    assert [sum(f.width for f in word) for word in packed128.LAYOUT.words] == [64, 64]
    sizes = {
        "packed64": 8 * formats.packed64.words(formats.make_spec("packed64", (16, 16))),
        "packed64, precision 64": 8 * formats.packed64.words(formats.make_spec("packed64", (16, 16), precision=64)),
        "packed128": 8 * packed128.words(formats.make_spec("packed128", (16, 16))),
    }
    assert sizes == {"packed64": 8, "packed64, precision 64": 16, "packed128": 16}


def test_the_hyperbolic_penalty_moves_no_angle() -> None:
    """4.4.3: lambda artanh(r)^2 pushes away from the rim: its slope grows without bound there."""
    slope = [2 * math.atanh(r) / (1 - r * r) for r in (0.01, 0.5, 0.9, 0.99)]
    assert slope == sorted(slope) and slope[-1] > 200


def test_the_printed_derivative_of_a_state_has_no_direction() -> None:
    """4.3.2.1: L(s) - min L(s') is positive where some change pays, but is one number for all changes."""

    def printed(loss: list[float], state: int) -> float:
        return loss[state] - min(value for other, value in enumerate(loss) if other != state)

    # The same number, whichever of the others is the better one.
    assert printed([1.0, 0.4, 2.0, 3.0], 0) == printed([1.0, 3.0, 2.0, 0.4], 0) > 0
    # It is negative only at the best state, and minus it is then the margin.
    losses = [0.3, 0.7, 0.5, 0.9]
    assert [printed(losses, s) < 0 for s in range(4)] == [True, False, False, False]
    # What a flip or a beam is accepted on, L(s') - L(s) of the state that it goes to, is minus the printed number.
    best = min(range(1, 4), key=losses.__getitem__)
    assert losses[best] - losses[0] == -printed(losses, 0)


def test_the_graph_of_4_2_4_is_differentiated_where_it_can_be() -> None:
    """Bits have no derivative; CORDIC, basis function and product have one, in r, theta and x."""
    spec = formats.make_spec("packed128", (4, 4), block=4, mode="faithful")
    code = packed128.code_of(*(torch.tensor([[v]]) for v in (2, 700, 3000, 3, 12345)))
    point = [torch.tensor([[v]], dtype=torch.float64, requires_grad=True) for v in (0.4, 1.0)]
    x = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def y(radius: torch.Tensor, angle: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return packed128.values(code, radius, angle, spec)[0] @ x

    assert torch.autograd.gradcheck(y, (*point, x))
    assert not code.is_floating_point()
