"""The peers and points of the headline table: what they hold, and what it weighs."""

import pytest
import torch
from torch import nn

from benchmarks import frontier
from benchmarks.headline import EXAMPLES
from benchmarks.smaller import BITS, NAMES, FewBitLSTM, few_bits, sized, spent, stored, widest
from rbe.errors import RbeError
from rbe.train import load_config


@pytest.mark.parametrize("bits", BITS)
def test_every_matrix_has_few_values_and_learns(bits: int) -> None:
    network = few_bits(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2)), bits)
    network(torch.randn(6, 3, 4, 4)).square().sum().backward()
    for layer in (network[0], network[2], network[3]):
        assert len(layer.weight.unique()) <= 2**bits
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_a_recurrent_layer_is_torchs_with_the_same_weights() -> None:
    like = nn.LSTM(5, 8, 2, batch_first=True)
    few = FewBitLSTM(like, 2)
    some = torch.randn(3, 7, 5)
    assert not few(some)[0].allclose(like(some)[0])
    for grid, p in zip(few.grids, list(like.parameters()), strict=True):
        p.data = grid(p).detach()
        assert p.ndim < 2 or len(p.unique()) <= 4
    # Its latents are like's own parameters, which now lie on the grid and stay there.
    x, state = torch.randn(3, 7, 5), (torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    for start in (None, state):
        (y, (h, c)), (z, (k, d)) = few(x, start), like(x, start)
        torch.testing.assert_close((y, h, c), (z, k, d))


def test_bytes_by_hand() -> None:
    network = nn.Sequential(nn.Linear(10, 3), nn.BatchNorm1d(3), nn.LSTM(3, 2))
    # Codes of 2 bits and a step of 2 bytes a matrix; 3 + 2 * 3 + 8 numbers of 2 bytes.
    assert stored(network, 2) == (8 + 2) + (6 + 2) + (4 + 2) + 2 * (3 + 6 + 8)


@pytest.mark.parametrize("name", NAMES)
def test_the_widest_network_that_fits(name: str) -> None:
    config, whole = load_config(EXAMPLES / f"{name}.toml"), 90_000
    size, nbytes = widest(config, 2, whole)
    each = config.model.heads if config.model.kind == "gpt" else 1
    smaller, make = sized(config, size)
    larger, more = sized(config, size + each)
    assert stored(make(smaller), 2) == nbytes <= whole < stored(more(larger), 2)


def test_a_frontier_has_one_number_of_bytes() -> None:
    with pytest.raises(RbeError, match="divides its bytes among groups"):
        frontier.point("multi30k-stream", 100, 1)


def test_the_epochs_that_a_dense_network_took() -> None:
    assert spent("resnet20-dense") == 30
    # 3, and 6 of images of half the height and width.
    assert spent("resnet20x4-dense") == 4.5
    assert spent("gpt-dense") == 27
