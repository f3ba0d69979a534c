"""What every seed layer shares: stored tensors of fixed dtype, and a weight that exists only while asked for."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from rbe import formats, kernels
from rbe.disk import check_angle, check_radius
from rbe.errors import RbeError
from rbe.formats import SeedSpec, outer128
from rbe.kernels import latent
from rbe.matrix import SeedMatrix
from rbe.nn.init import fresh_points, unit_scale
from rbe.nn.latents import LATENT, fresh_latents
from rbe.nn.stored import check_stored, convert_state, rounded
from rbe.outliers import BYTES, Outliers

ACTIVATIONS = ("float32", "int8")
_STORED = ("seeds", "scale", "row_scale", "code", "latent", "radius", "angle", "outlier_index", "outlier_values")
# Beside the version of a module in the metadata of a state dict.
_SPEC = "rbe.spec"


class Seeded(nn.Module):
    """A module around one seed matrix, and nothing dense. It is in one of two states.

    * Frozen, as files are: buffers `seeds`, `scale` and `row_scale`.
    * Open, to be trained; formats with a radius and an angle only: Parameters `radius`, `angle` (blocks, stages) and
      `scale`. The discrete bits are the buffer `code`, or, in outer128, the signs of the Parameter `latent` (blocks,
      stages, 64), whose gradient is that of its signs (straight through). The gradients are sums over
      dL/dW dW/d(r, theta), made without a dense matrix. A radius that a step took out of [0, 1) is refused at the next
      use: project it back.

    >>> from rbe.nn import Linear
    >>> layer = Linear(32, 16, format="packed128")
    >>> isinstance(layer, Seeded), layer.trainable, layer.freeze().trainable, layer.seeds.shape
    (True, True, False, torch.Size([2, 2]))

    It deliberately does not derive from torch's layers: tools that edit `weight` in place would edit a temporary.

    Attributes:
        spec: what the matrix is, apart from its tensors; rows are outputs, as in torch.
        fresh_rms: root mean square of fresh weights; by default that of torch's Linear, 1 / sqrt(3 columns).
        transposed: True where `weight` must look like the (in, out) weight of the layer that was replaced.
        weight_dtype: the dtype that `weight` has, following `.to()` and `.half()`; the stored scales never follow.
        activations: "float32" (exact) or "int8" (faster, one scale per row of the input).

    A tied module has an owner instead of buffers of its own, so one matrix is stored once.
    """

    spec: SeedSpec
    seeds: Tensor
    scale: Tensor
    row_scale: Tensor | None
    code: Tensor
    latent: Tensor
    radius: Tensor
    angle: Tensor
    outlier_index: Tensor | None
    outlier_values: Tensor | None

    def __init__(
        self,
        spec: SeedSpec,
        *,
        row_scale: bool = False,
        transposed: bool = False,
        trainable: bool = False,
        owner: "Seeded | None" = None,
        rms: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        formats.get(spec.format).check(spec)
        self.spec = spec
        self.transposed = transposed
        self.fresh_rms = (3 * spec.shape[1]) ** -0.5 if rms is None else rms
        self.weight_dtype = dtype or torch.get_default_dtype()
        self.activations = "float32"
        self._prepared: kernels.Prepared | kernels.Graded | None = None
        self._outliers: Outliers | None = None
        # Set by `listening`: what is to hear of the gradient of the dense matrix.
        self._listener: Callable[[Tensor], None] | None = None
        # A tuple hides the owner from torch's registry: it is not a submodule, so state dicts and sizes count it once.
        self._owner: tuple[Seeded, ...] = () if owner is None else (owner,)
        if owner is not None:
            return
        # Explicit dtypes: loaders build layers under a default dtype of their own choice.
        factor = torch.empty(spec.shape[0], dtype=torch.float16, device=device) if row_scale else None
        scale = torch.empty((), dtype=torch.float32, device=device)
        if trainable:
            shape = (spec.blocks, spec.stages)
            codes = (spec.blocks, formats.disk(spec.format).code_words(spec))
            self._open(
                torch.empty(codes, dtype=torch.int64, device=device),
                torch.empty(shape, dtype=torch.float32, device=device),
                torch.empty(shape, dtype=torch.float32, device=device),
                scale,
            )
        else:
            seeds = torch.empty(formats.seeds_shape(spec), dtype=torch.int64, device=device)
            self.register_buffer("seeds", seeds)
            self.register_buffer("scale", scale)
        self.register_buffer("row_scale", factor)
        for name in ("outlier_index", "outlier_values"):
            self.register_buffer(name, None)
        self.reset_parameters()

    def _open(self, code: Tensor, radius: Tensor, angle: Tensor, scale: Tensor) -> None:
        """Register the tensors of the open state."""
        if formats.disk(self.spec.format).SIGNS:
            signs = torch.empty((*code.shape, 64), device=code.device)
            signs = signs if code.is_meta else outer128.sign_bits(code, self.spec)
            self.register_parameter("latent", nn.Parameter(LATENT * signs))
        else:
            self.register_buffer("code", code)
        self.register_parameter("radius", nn.Parameter(radius))
        self.register_parameter("angle", nn.Parameter(angle))
        self.register_parameter("scale", nn.Parameter(scale))

    def reset_parameters(self) -> None:
        """Draw random seeds whose weights have the size `fresh_rms`."""
        if self._owner or self.scale.is_meta:
            return
        size = self.fresh_rms
        with torch.no_grad():
            if formats.is_disk(self.spec.format):
                code, radius, angle = fresh_points(self.spec)
                self.scale.fill_(size * unit_scale(self.spec, code, radius, angle))
                if self.trainable:
                    if formats.disk(self.spec.format).SIGNS:
                        self.latent.copy_(fresh_latents(outer128.sign_bits(code, self.spec)))
                    else:
                        self.code.copy_(code)
                    self.radius.copy_(radius)
                    self.angle.copy_(angle)
                else:
                    self.seeds.copy_(formats.disk(self.spec.format).join(code, radius, angle, self.spec))
            else:
                self.seeds.random_(-(1 << 63), None)
                # The code is a sum of four uniform bytes: its variance is 4 (256^2 - 1) / 12.
                self.scale.fill_(size / ((256**2 - 1) / 3) ** 0.5)
            if self.row_scale is not None:
                self.row_scale.fill_(1)

    @property
    def trainable(self) -> bool:
        """Whether the seeds are open: radius and angle are Parameters."""
        return "radius" in self.owner._parameters

    @property
    def opened(self) -> tuple[str, ...]:
        """Names of the tensors that stand, while the seeds are open, where they are otherwise."""
        return ("latent" if formats.disk(self.spec.format).SIGNS else "code", "radius", "angle")

    def unfreeze(self) -> Self:
        """Open the seeds for training, in place.

        >>> from rbe.nn import Linear
        >>> layer = Linear(32, 32, format="packed64").freeze()
        >>> [name for name, _ in layer.unfreeze().named_parameters()]
        ['radius', 'angle', 'scale', 'bias']

        Optimizers made before do not know the new Parameters. They are float32: points of packed64, which have more
        digits, are rounded, those next to the rim to 1 - 2^-24.

        Raises:
            RbeError: the format has no radius and angle.
        """
        owner = self.owner
        definition = formats.disk(self.spec.format)
        if not owner.trainable:
            code, radius, angle = definition.split(owner.seeds, self.spec)
            scale = owner.scale
            del owner.seeds, owner.scale
            owner._open(code, rounded(radius), angle.to(torch.float32), scale.clone())
            # The order in which files and optimizers see them: those of the seeds first.
            for name in [n for n in owner._parameters if n not in ("latent", "radius", "angle", "scale")]:
                owner._parameters[name] = owner._parameters.pop(name)
            owner._prepared = None
        return self

    def freeze(self) -> Self:
        """Pack radius, angle and code into seeds, in place; what files hold and what runs fastest.

        Raises:
            RbeError: a radius is outside [0, 1), or a number is not finite.
        """
        owner = self.owner
        if owner.trainable:
            latent = owner._parameters.get("latent")
            if latent is not None and not latent.isfinite().all():
                raise RbeError(f"{type(self).__name__}: a latent is not finite; training has diverged, lower its rate")
            matrix = owner.matrix
            for name in ("code", "latent", "radius", "angle", "scale"):
                if name in owner._parameters or name in owner._buffers:
                    delattr(owner, name)
            owner.register_buffer("seeds", matrix.seeds)
            owner.register_buffer("scale", matrix.scale)
            owner._prepared = None
        return self

    @property
    def owner(self) -> "Seeded":
        """The module that holds the tensors: this one, unless it is tied to another."""
        return self._owner[0] if self._owner else self

    @property
    def matrix(self) -> SeedMatrix:
        """The seed matrix; it shares this module's tensors, unless it is open: then the seeds are packed now.

        Raises:
            RbeError: the tensors that were loaded do not fit the specification, or a step left a radius outside [0, 1).
        """
        if self.trainable:
            with torch.no_grad():
                seeds = formats.disk(self.spec.format).join(self.read_code(), self.radius, self.angle, self.spec)
                return SeedMatrix(self.spec, seeds, self.scale.detach().clone(), self.row_scale, self.outliers)
        return SeedMatrix(self.spec, self.seeds, self.scale, self.row_scale, self.outliers)

    @property
    def outliers(self) -> Outliers | None:
        """Single weights that are added to what the seeds make, made ready once; None where there are none."""
        owner = self.owner
        index, values = owner._buffers.get("outlier_index"), owner._buffers.get("outlier_values")
        if index is None and values is None:
            return None
        if index is None or values is None:
            raise RbeError("outliers: positions without values, or values without positions; load the whole layer")
        if torch.compiler.is_compiling():
            return Outliers(self.spec.shape, index, values)
        ready = owner._outliers
        if ready is None or ready.index is not index or ready.values is not values:
            ready = owner._outliers = Outliers(self.spec.shape, index, values)
        return ready

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded now and forgotten afterwards; read-only, shaped like the replaced layer's."""
        rows, columns = self.spec.shape
        if self.scale.is_meta:
            dense = torch.empty(rows, columns, dtype=self.weight_dtype, device="meta")
        else:
            with torch.no_grad():
                dense = self.dense().to(self.weight_dtype)
        dense = dense.T if self.transposed else dense
        dense._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers would otherwise initialise it
        return dense

    def dense(self) -> Tensor:
        """The dense matrix (rows, columns), through which gradients flow to an open layer's radius, angle and scale."""
        return self.generator()()

    def generator(self) -> Callable[[], Tensor]:
        """What makes `dense`, from the tensors that the module has now, whatever it has when it is called."""
        spec, outliers, listener = self.spec, self.outliers, self.owner._listener
        decode: Callable[[], Tensor]
        if not self.trainable:
            decode = partial(kernels.decode, spec, self.seeds, self.scale, self.row_scale)
        else:
            bits, scale, row_scale, radius, angle = self._open_tensors()
            if formats.disk(spec.format).SIGNS:
                decode = partial(latent.decode, bits, radius, angle, scale, row_scale, spec)
            else:
                decode = partial(kernels.decode, spec, bits, scale, row_scale, radius, angle)

        def generate() -> Tensor:
            dense = decode()
            if listener is not None and dense.requires_grad:
                dense.register_hook(listener)  # type: ignore[no-untyped-call]
            return dense if outliers is None else outliers.add_to(dense)

        return generate

    @contextmanager
    def listening(self, listener: Callable[[Tensor], None]) -> Iterator[None]:
        """While inside, every backward pass tells the listener its gradient of the dense matrix (rows, columns).

        For searches among discrete bits, which have no derivative of their own. The dense matrix exists meanwhile.
        """
        self.owner._listener = listener
        try:
            yield
        finally:
            self.owner._listener = None

    def multiply(self, x: Tensor) -> Tensor:
        """The product of x (..., columns) with the matrix: (..., rows) in x's dtype."""
        if self.owner._listener is not None:
            return functional.linear(x, self.dense().to(x.dtype))
        if not self.trainable:
            y = self._ready().matmul(x, self.activations)
        else:
            bits, scale, row_scale, radius, angle = self._open_tensors()
            if formats.disk(self.spec.format).SIGNS:
                y = latent.matmul(x, bits, radius, angle, scale, row_scale, self.spec)
            else:
                y = kernels.seed_matmul(x, self.spec, bits, scale, row_scale, self.activations, radius, angle)
        outliers = self.outliers
        return y if outliers is None else outliers.add_product(y, x)

    def look_up(self, index: Tensor) -> Tensor:
        """Rows of the matrix: (*index.shape, columns) float32."""
        if self.owner._listener is not None:
            return self.dense()[index]
        if not self.trainable:
            rows = self._ready().rows(index)
        else:
            bits, scale, row_scale, radius, angle = self._open_tensors()
            if formats.disk(self.spec.format).SIGNS:
                rows = latent.rows(index, bits, radius, angle, scale, row_scale, self.spec)
            else:
                rows = kernels.rows(index, self.spec, bits, scale, row_scale, radius, angle)
        outliers = self.outliers
        return rows if outliers is None else outliers.add_to_rows(rows, index)

    def _open_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """(code or latent, scale, row_scale, radius, angle), as the kernels take them."""
        check_radius(self.radius, "radius of a layer")
        check_angle(self.angle, "angle of a layer")
        bits = self.latent if formats.disk(self.spec.format).SIGNS else self.code
        return bits, self.scale, self.row_scale, self.radius, self.angle

    def read_code(self) -> Tensor:
        """The discrete bits of the open state, int64 (blocks, stages or 0)."""
        if "code" in self.owner._buffers:
            return self.code
        return outer128.code_of(self.latent.detach(), self.spec)

    @torch.no_grad()
    def write_code(self, code: Tensor) -> None:
        """Change the discrete bits of the open state; a latent whose sign turns keeps its size."""
        if "code" in self.owner._buffers:
            self.code.copy_(code)
        else:
            # A latent of 0 counts as +1, and -0 does too: it needs a size to turn.
            size = self.latent.abs().clamp_min(torch.finfo(self.latent.dtype).tiny)
            self.latent.copy_(size * outer128.sign_bits(code, self.spec))

    def _adopt(self, matrix: SeedMatrix) -> None:
        """Take over the tensors of an encoded matrix."""
        self.seeds, self.scale, self.row_scale = matrix.seeds, matrix.scale, matrix.row_scale
        if matrix.outliers is not None:
            self.outlier_index, self.outlier_values = matrix.outliers.index, matrix.outliers.values

    def _ready(self) -> kernels.Prepared | kernels.Graded:
        """The matrix, checked once and ready for the kernels; made anew when a tensor was moved or replaced."""
        owner = self._owner[0] if self._owner else self
        tensors = owner._buffers
        seeds, scale, row_scale = tensors["seeds"], tensors["scale"], tensors["row_scale"]
        assert seeds is not None and scale is not None
        if torch.compiler.is_compiling():  # a traced binding must not outlive the trace
            return kernels.prepare(self.spec, seeds, scale, row_scale)
        prepared = owner._prepared
        if prepared is None or not prepared.fits(seeds, scale, row_scale):
            prepared = kernels.prepare(self.spec, seeds, scale, row_scale)
            if kernels.lasting():
                check_stored(self.spec, seeds, scale, row_scale)
                owner._prepared = prepared
        return prepared

    def __getattr__(self, name: str) -> Any:
        if name in _STORED and self._owner:
            return getattr(self._owner[0], name)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None, "_outliers": None}  # a binding holds raw addresses

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        about = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if about is not None:
            about[_SPEC] = self.spec.to_json()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, unexpected_keys: Any,
        error_msgs: list[str],
    ) -> None:  # fmt: skip
        # Seeds of another window or rotation have the same shape, and would make other weights without a word.
        stored = local_metadata.get(_SPEC)
        if stored is not None and SeedSpec.from_json(stored) != self.spec:
            error_msgs.append(
                f"{prefix.removesuffix('.')}: the state is of a layer with {SeedSpec.from_json(stored)}, this one has "
                f"{self.spec}; compress both models with the same settings, or use rbe.save and rbe.load"
            )
            return
        try:
            check_stored(self.spec, *(state_dict.get(prefix + name) for name in ("seeds", "scale", "row_scale")))
        except RbeError as wrong:
            error_msgs.append(f"{prefix.removesuffix('.')}: {wrong}")
            return
        if not self._owner and formats.is_disk(self.spec.format):
            convert_state(state_dict, prefix, self.spec, self.trainable)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in ("scale", "row_scale", "outlier_values")}
        points = {
            name: p.data
            for name in ("latent", "radius", "angle", "scale")
            if (p := self._parameters.get(name)) is not None
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            # .half() and .to(bfloat16) cast every float buffer; the scales keep their dtype and exact value.
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        for name, old in points.items():
            parameter = self._parameters[name]
            assert parameter is not None
            # float32 is what a seed stores: fewer bits would lose it, more are welcome to checks of gradients.
            least = torch.float32 if name == "scale" else torch.promote_types(parameter.dtype, torch.float32)
            if parameter.dtype != least:
                parameter.data = old.to(parameter.device, least)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        self._prepared = self._outliers = None
        return self

    def _describe(self) -> str:
        spec = self.spec
        stored = 8 * math.prod(formats.seeds_shape(spec)) + 4
        stored += 0 if self.row_scale is None else 2 * spec.shape[0]
        stored += 0 if self.outlier_index is None else BYTES * len(self.outlier_index)
        rate = 8 * stored / (spec.shape[0] * spec.shape[1])
        mode = f", mode={spec.mode}" if spec.mode else ""
        tied = ", tied" if self._owner else ""
        return f"format={spec.format}{mode}, bits={spec.bits:.4g} ({rate:.3g} stored){tied}"


class SeededVector(Seeded):
    """A vector made from one seed: the paper's form of a bias, or of the gain of a norm.

    >>> bias = SeededVector(40, format="packed64")
    >>> bias().shape, bias.matrix.nbytes - 4
    (torch.Size([40]), 8)

    Args:
        n: entries; the vector is an (n, 1) matrix of a single block.
        format, mode, precision, stages: as in `SeedSpec`; packed64 or packed128.
        rms: root mean square of the fresh entries.

    Raises:
        RbeError: the format does not offer whole matrices as one block.

    Source: 000 sections 5.2.2 and 5.4.2.
    """

    def __init__(
        self,
        n: int,
        *,
        format: str = "packed64",
        mode: str | None = None,
        precision: int = 32,
        stages: int = 1,
        rms: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        formats.disk(format)
        if format == "outer128":
            raise RbeError(
                "seeds of outer128 make blocks of a matrix, no vectors; keep biases and norms dense, bias=True and "
                "parameters='dense', or give the layer format packed64 or packed128"
            )
        spec = formats.make_spec(format, (n, 1), block=None, mode=mode, precision=precision, stages=stages)
        super().__init__(spec, trainable=True, rms=rms, device=device, dtype=dtype)

    def forward(self) -> Tensor:
        """The vector (n,), in the dtype of `weight`, or float64 where its radius is."""
        vector = self.dense()[:, 0]
        return vector if vector.dtype == torch.float64 else vector.to(self.weight_dtype)

    def extra_repr(self) -> str:
        """Length and rate."""
        return f"{self.spec.shape[0]}, {self._describe()}"


def set_activations(model: nn.Module, activations: str) -> nn.Module:
    """Choose how every seed layer of a model reads its input: "float32" (exact) or "int8" (faster).

    >>> from rbe.nn import Linear
    >>> set_activations(nn.Sequential(Linear(16, 16)), "int8")[0].activations
    'int8'

    Returns:
        the model.

    Raises:
        RbeError: there is no such choice.
    """
    if activations not in ACTIVATIONS:
        raise RbeError(f"activations {activations!r} is not offered; choose one of {', '.join(ACTIVATIONS)}")
    for module in model.modules():
        if isinstance(module, Seeded):
            module.activations = activations
    return model
