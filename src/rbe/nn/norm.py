"""Norms: `LayerNorm`, `RMSNorm` and `BatchNorm1d/2d`, with a dense gain and shift or with one seed each."""

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from rbe.errors import RbeError
from rbe.formats import packed128
from rbe.nn.conv import Conv1d, Conv2d
from rbe.nn.linear import Linear
from rbe.nn.options import Options, check_unused, factory, seeded_vector
from rbe.nn.seeded import SeededVector

# Size of the random part of a fresh gain or shift from seeds: small, so that a fresh norm is nearly the plain one.
FRESH_RMS = 0.02
PARAMETERS = ("dense", "seed")

Layer = TypeVar("Layer", Linear, Conv1d, Conv2d)


class Affine(nn.Module):
    """The gain and the shift that the norms share: dense Parameters `weight` and `bias`, or one seed each.

    From seeds the gain is 1 + value and the shift is value; as printed (mode="faithful") the gain is the value alone,
    which reaches 1 only with a scale or at the rim of the disk.
    """

    weight: Tensor | None
    bias: Tensor | None
    weight_seed: SeededVector | None
    bias_seed: SeededVector | None

    def __init__(self, shape: int | Sequence[int], gain: bool, shift: bool, parameters: str, options: Options) -> None:
        super().__init__()
        name = type(self).__name__
        check_unused(name, options)
        if parameters not in PARAMETERS:
            raise RbeError(f"{name}: parameters {parameters!r} are not offered; choose one of {', '.join(PARAMETERS)}")
        self.shape = (int(shape),) if isinstance(shape, int) else tuple(int(side) for side in shape)
        if not self.shape or min(self.shape) < 1:
            raise RbeError(f"{name}: shape {self.shape} is empty; give the sides that are normalised")
        self.printed = options.get("mode") == "faithful"
        for name, wanted in (("weight", gain), ("bias", shift)):
            dense = nn.Parameter(torch.empty(self.shape, **factory(options))) if parameters == "dense" else None
            self.register_parameter(name, dense if wanted else None)
            rms = 1.0 if self.printed and name == "weight" else FRESH_RMS
            size = math.prod(self.shape)
            seed = seeded_vector(size, options, rms) if wanted and parameters == "seed" else None
            self.register_module(f"{name}_seed", seed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A gain of about 1 and a shift of about 0: exactly so where they are dense."""
        for dense, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if dense is not None and not dense.is_meta:
                nn.init.constant_(dense, value)
        for seed in (self.weight_seed, self.bias_seed):
            if seed is not None:
                seed.reset_parameters()
        if self.printed and self.weight_seed is not None and not self.weight_seed.scale.is_meta:
            _level(self.weight_seed)

    def gain(self) -> Tensor | None:
        """The gain in the shape that is normalised, None where there is none."""
        if self.weight_seed is None:
            return self.weight
        value: Tensor = self.weight_seed()
        value = value.reshape(self.shape)
        return value if self.printed else 1.0 + value

    def shift(self) -> Tensor | None:
        """The shift in the shape that is normalised, None where there is none."""
        if self.bias_seed is None:
            return self.bias
        value: Tensor = self.bias_seed()
        return value.reshape(self.shape)

    def extra_repr(self) -> str:
        """Shape and settings."""
        kind = "seed" if self.weight_seed is not None or self.bias_seed is not None else "dense"
        return f"{self.shape}, eps={self.eps}, parameters={kind}{', as printed' if self.printed else ''}"


def _level(vector: SeededVector) -> None:
    """Turn fresh values into a gain of about 1.

    A faithful packed128 makes a vector from cos or sin of q times an angle that is the same in each half: it may be +1
    in one half and -1 in the other, or 0 throughout. With q = 0 it is constant.
    """
    with torch.no_grad():
        if vector.spec.format == "packed128":
            code = vector.code if vector.trainable else vector.seeds[:, ::2]
            fields = packed128.fields(code)
            code.copy_(packed128.code_of(**{**fields, "basis_sel": torch.zeros_like(code)}))
        vector.scale.div_(vector().mean())


def _check_tail(layer: Affine, x: Tensor) -> None:
    if tuple(x.shape[-len(layer.shape) :]) != layer.shape:
        raise RbeError(f"{type(layer).__name__}: x is {tuple(x.shape)}, but its last sides must be {layer.shape}")


def _like(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(x.dtype)


class LayerNorm(Affine):
    """(x - mean) / sqrt(variance + eps) * gain + shift over the last sides; constructor shapes like torch's.

    >>> norm = LayerNorm(32, parameters="seed", format="packed64")
    >>> norm(torch.randn(4, 32)).shape, sum(seed.matrix.seeds.numel() for seed in norm.children())
    (torch.Size([4, 32]), 2)

    Args:
        normalized_shape: the last sides of x.
        eps: inside the root; with mode="faithful" it is added to the standard deviation instead (0 is the formula).
        elementwise_affine: whether there is a gain; bias: whether there is a shift beside it.
        parameters: "dense", or "seed" for one seed each.
        options: as in `Linear`; of the seeds, and mode="faithful". A vector is one seed, whatever bits, block, window
            and rotation the matrices of a model have.

    Raises:
        RbeError: a choice is not offered; on the forward pass, x has other last sides.

    Source: 000 section 5.4.1 and 5.4.2.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        parameters: str = "dense",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, elementwise_affine and bias, parameters, options)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x of any leading sides; the result has x's shape and dtype."""
        _check_tail(self, x)
        gain, shift = _like(self.gain(), x), _like(self.shift(), x)
        if not self.printed:
            return nn.functional.layer_norm(x, self.shape, gain, shift, self.eps)
        sides = tuple(range(-len(self.shape), 0))
        centred = x - x.mean(sides, keepdim=True)
        y = centred / (centred.square().mean(sides, keepdim=True).sqrt() + self.eps)
        y = y if gain is None else y * gain
        return y if shift is None else y + shift


class RMSNorm(Affine):
    """x / sqrt(mean(x^2) + eps) * gain over the last sides; constructor shapes like torch's.

    >>> RMSNorm(32)(torch.ones(4, 32)).mean().round(decimals=4).item()
    1.0

    Args:
        normalized_shape: the last sides of x.
        eps: inside the root, the machine epsilon of x where None; with mode="faithful" outside, as printed.
        elementwise_affine: whether there is a gain.
        parameters: "dense", or "seed" for one seed.
        options: as in `Linear`; of the seed, and mode="faithful".

    Raises:
        RbeError: a choice is not offered; on the forward pass, x has other last sides.

    Source: 000 section 5.4.3.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        parameters: str = "dense",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, False, parameters, options)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x of any leading sides; the result has x's shape and dtype."""
        _check_tail(self, x)
        gain = _like(self.gain(), x)
        if not self.printed:
            return nn.functional.rms_norm(x, self.shape, gain, self.eps)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        y = x / (x.square().mean(tuple(range(-len(self.shape), 0)), keepdim=True).sqrt() + eps)
        return y if gain is None else y * gain


class BatchNorm(Affine):
    """What `BatchNorm1d` and `BatchNorm2d` share; the running variance is the unbiased one, as in torch."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        parameters: str = "dense",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_features, affine, affine, parameters, options)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.track_running_stats = track_running_stats
        statistics = factory(options)
        for name, value in (("running_mean", torch.zeros), ("running_var", torch.ones)):
            self.register_buffer(name, value(num_features, **statistics) if track_running_stats else None)
        count = torch.tensor(0, dtype=torch.int64, device=statistics["device"])
        self.register_buffer("num_batches_tracked", count if track_running_stats else None)

    def _normalise(self, x: Tensor, sides: tuple[int, ...]) -> Tensor:
        if x.ndim not in sides or x.shape[1] != self.num_features:
            wanted = " or ".join(f"{side}-D" for side in sides)
            raise RbeError(
                f"{type(self).__name__}: x is {tuple(x.shape)}; it must be {wanted} with {self.num_features} channels "
                "on its second side"
            )
        batch = self.training or self.running_mean is None
        factor = 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        mean = self.running_mean if not batch or self.track_running_stats else None
        variance = self.running_var if not batch or self.track_running_stats else None
        gain, shift = _like(self.gain(), x), _like(self.shift(), x)
        return nn.functional.batch_norm(x, mean, variance, gain, shift, batch, factor, self.eps)


class BatchNorm1d(BatchNorm):
    """Norm of every channel over a batch (n, channels) or (n, channels, length); constructor shapes like torch's.

    >>> BatchNorm1d(8, parameters="seed")(torch.randn(16, 8)).shape
    torch.Size([16, 8])

    Args:
        num_features: channels.
        eps: inside the root.
        momentum: weight of the newest batch in the running statistics; None takes the mean of all batches.
        affine: whether there are a gain and a shift; track_running_stats: whether there are running statistics.
        parameters: "dense", or "seed" for one seed each.
        options: as in `Linear`, of the seeds.

    Raises:
        RbeError: a choice is not offered; on the forward pass, x has other sides.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (n, channels) or (n, channels, length); the result has its shape."""
        return self._normalise(x, (2, 3))


class BatchNorm2d(BatchNorm):
    """As `BatchNorm1d`, for images (n, channels, height, width).

    >>> BatchNorm2d(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (n, channels, height, width); the result has its shape."""
        return self._normalise(x, (4,))


def fold(layer: Layer, norm: BatchNorm | nn.BatchNorm1d | nn.BatchNorm2d) -> Layer:
    """A copy of a layer that does the work of the batch norm after it too, with the norm's running statistics.

    >>> layer, norm = Linear(8, 4), BatchNorm1d(4).eval()
    >>> x = torch.randn(3, 8)
    >>> bool((fold(layer, norm)(x) - norm(layer(x))).abs().max() < 1e-2)
    True

    The norm multiplies every output by a factor of its own: it goes into the float16 `row_scale`, so that the seeds
    stay as they are; the largest factor goes into `scale`. A factor of at least 2^-14 of the largest is rounded by at
    most 2^-11 of itself, a smaller one by up to 2^-25 of the largest: below that an output keeps only its offset. The
    rest is a dense bias.

    Raises:
        RbeError: the norm has no running statistics or other channels, or the layer's output side is rotated.
    """
    name, channels = type(layer).__name__, layer.spec.shape[0]
    if norm.running_mean is None or norm.running_var is None:
        raise RbeError("fold: the norm keeps no running statistics; only a norm that does is a fixed map")
    if norm.num_features != channels:
        raise RbeError(f"fold: the norm has {norm.num_features} channels, but the {name} has {channels} outputs")
    if layer.spec.rotation[0]:
        raise RbeError(f"fold: the output side of this {name} is rotated, so rows have no factors; rotate 'in' only")
    folded = copy.deepcopy(layer)
    with torch.no_grad():
        gain, shift = (norm.gain(), norm.shift()) if isinstance(norm, BatchNorm) else (norm.weight, norm.bias)
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        factor = factor if gain is None else factor * gain.double()
        offset = -norm.running_mean.double()
        bias: Any = layer.bias if layer.bias_seed is None else layer.bias_seed()
        offset = (offset if bias is None else offset + bias.double()) * factor
        offset = offset if shift is None else offset + shift.double()
        if layer.outlier_index is not None and layer.outlier_values is not None:
            rows = layer.outlier_index.long() // layer.spec.shape[1]
            folded.outlier_values = (layer.outlier_values.double() * factor[rows]).half()
        if layer.row_scale is not None:
            factor = factor * layer.row_scale.double()
        top = factor.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        folded.row_scale = (factor / top).half()
        folded.scale.mul_(top)
        folded.bias_seed = None
        folded.bias = nn.Parameter(offset.to(layer.weight_dtype))
    return folded
