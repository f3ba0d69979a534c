"""What is stored beside the seeds: norms folded wherever they can be, 16 or 8 bits, every byte counted."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.nn import (
    BatchNorm2d,
    Conv2d,
    Linear,
    Seeded,
    fold_norms,
    pack,
    round_rest,
    stored_bytes,
    unpack,
)


class Residual(nn.Module):
    """Two convolutions with norms and a way around them, as in a ResNet; one norm stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = Conv2d(3, 8, 3, padding=1, bias=False, format="outer128", block=8), nn.BatchNorm2d(8)
        self.second, self.norm2 = Conv2d(8, 8, 3, padding=1, bias=False, format="packed128"), BatchNorm2d(8)
        self.around, self.alone = Conv2d(3, 8, 1, format="outer128", block=8), nn.BatchNorm2d(8)
        self.head = Linear(8, 4, format="outer128", block=8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return self.head(self.alone(y + self.around(x)).relu().mean((2, 3)))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics and gains that are not those of a fresh norm; seeds frozen."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith(("1.weight", "1.bias")):
            nn.init.uniform_(p, 0.5, 1.5)
    model.train()
    for _ in range(20):
        model(x)
    for module in model.modules():
        if isinstance(module, Seeded):
            module.freeze()
    return model.eval().requires_grad_(False)


def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(64, 32)
    layers = [Linear(32, 48, format="outer128"), nn.BatchNorm1d(48), nn.ReLU(), Linear(48, 10, format="outer128")]
    return trained(nn.Sequential(*layers), x), x


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_norms_of_a_chain_are_folded() -> None:
    model, x = mlp()
    before = model(x)
    assert fold_norms(model) == 1
    assert isinstance(model[1], nn.Identity)
    assert relative(model(x), before) < 1e-3
    assert fold_norms(model) == 0


def test_norms_between_branches_are_folded_where_one_layer_feeds_them() -> None:
    torch.manual_seed(2)
    x = torch.randn(8, 3, 6, 6)
    model = trained(Residual(), x)
    before = model(x)
    assert fold_norms(model) == 2
    assert isinstance(model.alone, nn.BatchNorm2d)  # it follows a sum
    assert relative(model(x), before) < 1e-3


def test_what_is_used_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how, self.layer, self.norm = how, Linear(16, 16, format="outer128"), nn.BatchNorm1d(16)
            self.other = Linear.tied(self.layer) if how == "tied" else None

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            if self.how == "output":
                return self.norm(y) + y
            if self.how == "layer":
                return self.norm(self.layer(y))
            if self.how == "norm":
                return self.norm(self.norm(y))
            if self.how == "control" and y.sum() > 0:
                return self.norm(y)
            return self.other(self.norm(y)) if self.other is not None else self.norm(-y)

    for how in ("output", "layer", "norm", "tied", "control", "between"):
        model = Twice(how).eval()
        before = model(torch.ones(4, 16))
        assert fold_norms(model) == 0, how
        assert torch.equal(model(torch.ones(4, 16)), before)


@pytest.mark.parametrize(("bits", "error"), [(32, 1e-3), (16, 2e-3), (8, 2e-2)])
def test_stored_tensors_are_all_there_is(bits: int, error: float) -> None:
    model, x = mlp()
    before = model(x)
    stored = round_rest(model, bits)
    assert relative(model(x), before) < error
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    again, _ = mlp()
    fold_norms(again)
    unpack(again, torch.load(file, weights_only=True))
    assert torch.equal(again(x), model(x))
    seeds = 16 * (3 * 2 + 1 * 3)
    rest = {32: 2 * 48 + 4 * 58, 16: 2 * 48 + 2 * 58, 8: 48 + 58 + 3 * 4}[bits]
    assert stored_bytes(stored) == seeds + 2 * 4 + rest


def test_eight_bits_are_within_half_a_step_and_keep_their_grid() -> None:
    layer = Linear(16, 64, format="outer128").freeze().requires_grad_(False)
    bias = layer.bias.clone()
    stored = pack(layer, 8)
    assert stored["bias"].dtype == torch.int8
    unpack(layer, stored)
    step = float(bias.abs().max()) / 127
    assert stored["bias.step"].item() == pytest.approx(step)
    assert float((layer.bias - bias).abs().max()) <= step / 2 * (1 + 1e-5)
    assert torch.equal(pack(layer, 8)["bias"], stored["bias"])


def test_a_norm_that_stays_keeps_its_statistics_in_sixteen_bits() -> None:
    torch.manual_seed(3)
    x = torch.randn(8, 3, 6, 6)
    model = trained(Residual(), x)
    with torch.no_grad():
        model.alone.running_var[0] = 1e-4 * model.alone.running_var.max()
    before = model(x)
    stored = round_rest(model, 8)
    assert stored["alone.running_var"].dtype == torch.float16
    assert stored["alone.weight"].dtype == torch.int8
    assert not any(name.endswith("num_batches_tracked") for name in stored)
    assert relative(model(x), before) < 0.05


def test_numbers_out_of_reach_stay_or_are_refused() -> None:
    layer = Linear(16, 16, format="outer128").freeze().requires_grad_(False)
    layer.bias[0] = 1e6
    assert pack(layer, 16)["bias"].dtype == torch.float32
    layer.bias.zero_()
    assert (pack(layer, 8)["bias"] == 0).all()
    layer.bias[0] = torch.nan
    with pytest.raises(RbeError, match="bias has numbers that are not finite"):
        pack(layer, 8)


def test_wrong_uses_are_named() -> None:
    layer = Linear(16, 16, format="outer128")
    with pytest.raises(RbeError, match="open"):
        pack(layer)
    with pytest.raises(RbeError, match="bits 4"):
        pack(layer.freeze(), 4)
    model, _ = mlp()
    whole = copy.deepcopy(model)
    stored = round_rest(model, 16)
    with pytest.raises(RbeError, match="fold_norms"):
        unpack(whole, stored)
    with pytest.raises(RbeError, match=r"0\.bias missing"):
        unpack(model, {name: t for name, t in stored.items() if name != "0.bias"})
    with pytest.raises(RbeError, match="size mismatch"):
        unpack(model, {**stored, "0.bias": torch.zeros(3)})
