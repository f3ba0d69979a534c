"""Neural-network layers (000): the printed byte counts and formulas, beside what is implemented and what is wrong."""

import math

import numpy as np
import pytest
import torch

from rbe import disk, nn

# GPT-2 small.
HEADS, MODEL, HEAD, FORWARD = 12, 768, 64, 3072


def attention_ratio(h: int, d_model: int, d_k: int) -> float:
    """5.3.2."""
    return 16 * h * d_model * d_k / (8 * (3 * h + 1))


def block_ratio(h: int, d_model: int, d_k: int, d_ff: int) -> float:
    """5.8.2."""
    return (16 * h * d_model * d_k + 8 * d_model * d_ff) / (8 * (3 * h + 9))


def test_a_linear_layer_is_sixteen_bytes() -> None:
    """5.2.2."""
    found = nn.count(nn.Linear(784, 256, format="packed64", block=None, bias="seed"))
    assert found.seed_bytes == 16
    assert (4 * 256 * 784 + 4 * 256) / found.seed_bytes == 256 * (784 + 1) / 4


def test_an_embedding_is_eight_bytes() -> None:
    """5.6.2."""
    found = nn.count(nn.Embedding(50257, MODEL, format="packed64", block=None))
    assert found.seed_bytes == 8 and found.printed_ratio == 50257 * MODEL / 2


def test_attention_is_three_seeds_a_head_and_one() -> None:
    """5.3.2, on the layer itself."""
    found = nn.count(nn.MultiheadAttention(MODEL, HEADS, bias=False, format="packed64", block=None))
    assert found.seed_bytes == (3 * HEADS + 1) * 8
    assert found.printed_ratio == attention_ratio(HEADS, MODEL, HEAD)


def test_a_block_of_layers_is_three_seeds_a_head_and_nine() -> None:
    """5.8.2, on the layers themselves: attention, feed-forward with biases, two norms."""
    whole = {"format": "packed64", "block": None}
    parts = [
        nn.MultiheadAttention(MODEL, HEADS, bias=False, **whole),
        nn.FeedForward(MODEL, FORWARD, bias="seed", **whole),
        *(nn.LayerNorm(MODEL, parameters="seed", format="packed64") for _ in range(2)),
    ]
    counts = [nn.count(part) for part in parts]
    assert [c.seed_bytes for c in counts] == [(3 * HEADS + 1) * 8, 4 * 8, 2 * 8, 2 * 8]
    matrices = 4 * sum(c.matrix_weights for c in counts)
    assert matrices / sum(c.seed_bytes for c in counts) == pytest.approx(block_ratio(HEADS, MODEL, HEAD, FORWARD))


def test_printed_ratios_of_gpt2() -> None:
    assert attention_ratio(HEADS, MODEL, HEAD) == pytest.approx(31_882, abs=1)
    assert block_ratio(HEADS, MODEL, HEAD, FORWARD) == pytest.approx(78_643, abs=1)


def test_the_204_to_1_is_another_format() -> None:
    """5.11.1: 2.3 MB are some 287,500 seeds of 8 bytes, one for 20x20 weights; not (3h + 9) seeds a block of layers."""
    seeds = 2.3e6 / 8
    assert seeds == 287_500
    assert 117e6 / seeds == pytest.approx(407, abs=1) == pytest.approx(20 * 20, rel=0.02)
    assert pytest.approx(28 * 28, rel=0.04) == 117e6 / (2.3e6 / 16)
    assert 12 * 8 * (3 * HEADS + 9) < 5000


def test_two_norms_are_four_vectors() -> None:
    """5.8.2 counts 2 d floats for the norms of a block; two LayerNorms have a gain and a shift each."""
    norms = [torch.nn.LayerNorm(MODEL) for _ in range(2)]
    assert sum(p.numel() for norm in norms for p in norm.parameters()) == 4 * MODEL


def test_all_heads_of_one_shape_differ_by_a_number() -> None:
    """5.3.3: phi is fixed, so every restored matrix of one shape is a multiple of the same one."""
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers.append(nn.Linear(32, 24, bias=False, format="packed64", block=None).weight.double())
    for other in layers[1:]:
        ratio = other / layers[0]
        assert float(ratio.std()) < 1e-5 * float(ratio.abs().mean())
    assert torch.linalg.matrix_rank(torch.stack([w.flatten() for w in layers]), rtol=1e-5) == 1


def test_the_fifth_argument_is_a_target_in_one_chapter_and_a_gradient_in_another() -> None:
    """5.9.2: summing Euclidean gradients and scaling once is the Riemannian gradient of the sum; the same is not true
    of anything that is not linear, such as clipping, so scaling waits for the whole sum."""
    draw = torch.Generator().manual_seed(0)
    r = torch.tensor(0.6, dtype=torch.float64)
    parts = torch.randn(50, 2, generator=draw, dtype=torch.float64)
    whole = disk.polar_gradient(r, parts[:, 0].sum(), parts[:, 1].sum())
    single = [disk.polar_gradient(r, a, b) for a, b in parts]
    assert float(whole[0]) == pytest.approx(sum(float(s[0]) for s in single))
    clipped = sum(float(s[0].clamp(-0.05, 0.05)) for s in single)
    assert clipped != pytest.approx(float(whole[0].clamp(-0.05, 0.05)))


def test_riemannian_scaling_is_what_adam_divides_out() -> None:
    """5.9: at a fixed point the factor is a constant, and Adam's step does not depend on constants."""

    def step(factor: float) -> float:
        p = torch.nn.Parameter(torch.tensor(0.5))
        adam = torch.optim.Adam([p], lr=0.01, eps=1e-12)
        p.grad = torch.tensor(0.3 * factor)
        adam.step()
        return float(p.detach())

    assert step(1.0) == pytest.approx(step((1 - 0.5**2) ** 2 / 4), abs=1e-7)


def test_the_first_printed_epoch_does_nothing() -> None:
    """5.10.1: epoch / warmup is 0 at epoch 0."""
    assert 0 / 100 == 0.0
    from rbe.optim import WarmupDecay

    assert WarmupDecay()(0) == 0.01


def test_decay_of_the_angle_is_decay_of_the_weight_to_zero() -> None:
    """5.10.2: sin(theta) -> 0 with theta, while decay of artanh(r) alone keeps the sign of every weight."""
    theta, c = 1.2, []
    for _ in range(200):
        theta *= 0.95
        c.append(math.sin(theta))
    assert c[-1] < 1e-4


def test_epsilon_outside_the_root_is_another_norm() -> None:
    """5.4.3 divides by rms + eps; with eps inside the root, as everywhere else, tiny inputs differ and 0 stays 0."""
    x, eps = np.full(16, 1e-5), 1e-5
    rms = math.sqrt((x * x).mean())
    inside, outside = x / math.sqrt((x * x).mean() + eps), x / (rms + eps)
    assert inside[0] < 0.01 < 0.4 < outside[0]
    norm = nn.RMSNorm(16, eps=eps)
    np.testing.assert_allclose(norm(torch.from_numpy(x).float()).detach().numpy(), inside, rtol=1e-4)


def test_a_printed_gain_is_below_one() -> None:
    """5.4.2: gamma = c phi with |c| < 1 reaches 1 only at the rim; here gamma is 1 + value."""
    assert max(math.tanh(2 * math.atanh(r)) for r in (0.5, 0.9, 0.999)) < 1
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    plain = torch.nn.functional.layer_norm(x, (16,))
    norm = nn.LayerNorm(16, bias=False, parameters="seed", format="packed64")
    (seed,) = norm.children()
    torch.testing.assert_close(norm(x), plain * (1 + seed()))
    printed = nn.LayerNorm(16, bias=False, eps=0.0, parameters="seed", format="packed64", mode="faithful")
    (seed,) = printed.children()
    torch.testing.assert_close(printed(x), plain * seed(), rtol=1e-3, atol=1e-4)
