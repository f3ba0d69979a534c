"""The trellis format against an independent evaluation of its printed definition, and its laws."""

import numpy as np
import pytest
import torch

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec, trellis

CASES = [(w, window) for w in range(1, 9) for window in trellis.WINDOWS]


def random_seeds(blocks: int, w: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (blocks, 2 * w), generator=generator)


def by_hand(words: list[int], w: int, window: int, i: int, j: int) -> int:
    """One weight from the sentences of the definition, in Python integers only."""
    ring = sum((word % 2**64) << (64 * k) for k, word in enumerate(words))
    bits = 128 * w
    t = 16 * j + i
    end = -(-w * (t + 1) // 2)
    value = 0
    for k in range(window):
        value |= ((ring >> ((end - window + k) % bits)) & 1) << k
    product = value * trellis.multipliers(window, w)[t % 2] % 2**32
    return sum(product.to_bytes(4, "little")) - 510


@pytest.mark.parametrize(("w", "window"), CASES)
def test_generate_equals_the_printed_definition(w: int, window: int) -> None:
    seeds = random_seeds(2, w, seed=w)
    codes = trellis.generate(seeds, SeedSpec("trellis", (16, 32), bits=w / 2, window=window))
    rng = np.random.default_rng(w)
    cells = [(0, 0), (15, 0), (1, 0), (0, 15), (15, 15), *rng.integers(0, 16, (25, 2)).tolist()]
    for block in range(2):
        for i, j in cells:
            assert codes[block, i, j].item() == by_hand(seeds[block].tolist(), w, window, i, j)


@pytest.mark.parametrize("w", range(1, 9))
def test_pack_and_unpack_are_inverse(w: int) -> None:
    seeds = random_seeds(5, w)
    assert torch.equal(trellis.pack(trellis.unpack(seeds)), seeds)
    fields = trellis.layout(w).unpack(seeds)
    assert torch.equal(trellis.layout(w).pack(fields), seeds)


@pytest.mark.parametrize("w", range(1, 9))
def test_every_ring_bit_reaches_a_weight(w: int) -> None:
    seeds = random_seeds(1, w)
    plain = trellis.windows(seeds, 12)
    for p in range(0, 128 * w, 7):
        flipped = seeds.clone()
        flipped[0, p // 64] ^= torch.tensor(1 << (p % 64) if p % 64 < 63 else -(2**63))
        assert not torch.equal(trellis.windows(flipped, 12), plain)


@pytest.mark.parametrize(("w", "window"), CASES)
def test_codes_are_centred_and_in_range(w: int, window: int) -> None:
    table = trellis.code_table(window, w)
    assert table.shape == (2, 2**window)
    assert table.min() >= -510 and table.max() <= 510
    # A biased code would add its squared mean to every error; 1 % of the deviation costs 0.01 % of the energy.
    assert (table.double().mean(1).abs() / table.double().std(1)).max() < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2.25}, "2.25 bits per weight is not offered; choose one of 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4"),
        ({"bits": 8}, "not offered"),
        ({"window": 13}, "window 13 is not offered"),
        ({"block": 8}, "blocks of 16"),
        ({"mode": "faithful"}, "mode 'faithful' is not offered"),
    ],
)
def test_bad_specifications_are_refused(change: dict, message: str) -> None:
    spec = SeedSpec("trellis", **{"shape": (16, 16), "bits": 2.0, **change})
    with pytest.raises(RbeError, match=message):
        trellis.check(spec)


def test_seeds_of_another_rate_are_refused() -> None:
    with pytest.raises(RbeError, match=r"take int64 \(blocks, 8\)"):
        trellis.generate(random_seeds(1, 3), SeedSpec("trellis", (16, 16), bits=2.0))


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(RbeError, match="trellis"):
        formats.get("gptq")
