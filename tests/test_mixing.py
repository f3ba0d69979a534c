"""Mixing equals a plain evaluation in Python integers."""

import torch

from rbe.mixing import fmix32, signs


def by_hand(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_fmix32_equals_the_published_finaliser() -> None:
    values = [0, 1, 2, 255, 65536, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    assert fmix32(torch.tensor(values)).tolist() == [by_hand(v) for v in values]


def test_fmix32_is_a_bijection_on_a_sample() -> None:
    assert fmix32(torch.arange(1 << 16)).unique().numel() == 1 << 16


def test_signs_follow_the_low_bit_and_balance() -> None:
    s = signs(4096, 0x12345678)
    assert s.tolist() == [1.0 - 2 * (by_hand(k ^ 0x12345678) & 1) for k in range(4096)]
    assert abs(s.sum().item()) < 300
