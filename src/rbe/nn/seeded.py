"""What every seed layer shares: stored tensors of fixed dtype, and a weight that exists only while asked for."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from rbe import formats, kernels
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.matrix import SeedMatrix

ACTIVATIONS = ("float32", "int8")
_STORED = ("seeds", "scale", "row_scale")
# Beside the version of a module in the metadata of a state dict.
_SPEC = "rbe.spec"


class Seeded(nn.Module):
    """A module around one seed matrix: buffers `seeds`, `scale` and `row_scale`, and nothing dense.

    It deliberately does not derive from torch's layers: tools that edit `weight` in place would edit a temporary.

    Attributes:
        spec: what the matrix is, apart from its tensors; rows are outputs, as in torch.
        transposed: True where `weight` must look like the (in, out) weight of the layer that was replaced.
        weight_dtype: the dtype that `weight` has, following `.to()` and `.half()`; the stored scales never follow.
        activations: "float32" (exact) or "int8" (faster, one scale per row of the input).

    A tied module has an owner instead of buffers of its own, so one matrix is stored once.
    """

    spec: SeedSpec
    seeds: Tensor
    scale: Tensor
    row_scale: Tensor | None

    def __init__(
        self,
        spec: SeedSpec,
        *,
        row_scale: bool = False,
        transposed: bool = False,
        owner: "Seeded | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        definition = formats.get(spec.format)
        definition.check(spec)
        self.spec = spec
        self.transposed = transposed
        self.weight_dtype = dtype or torch.get_default_dtype()
        self.activations = "float32"
        self._prepared: kernels.Prepared | None = None
        # A tuple hides the owner from torch's registry: it is not a submodule, so state dicts and sizes count it once.
        self._owner: tuple[Seeded, ...] = () if owner is None else (owner,)
        if owner is not None:
            return
        # Explicit dtypes: loaders build layers under a default dtype of their own choice.
        seeds = torch.empty((spec.blocks, definition.words(spec)), dtype=torch.int64, device=device)
        self.register_buffer("seeds", seeds)
        self.register_buffer("scale", torch.empty((), dtype=torch.float32, device=device))
        factor = torch.empty(spec.shape[0], dtype=torch.float16, device=device) if row_scale else None
        self.register_buffer("row_scale", factor)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random seeds whose weights have the variance 1 / (3 columns), like a fresh torch Linear."""
        if self._owner or self.seeds.is_meta:
            return
        with torch.no_grad():
            self.seeds.random_(-(1 << 63), None)
            # The code is a sum of four uniform bytes: its variance is 4 (256^2 - 1) / 12.
            self.scale.fill_((3 * self.spec.shape[1]) ** -0.5 / ((256**2 - 1) / 3) ** 0.5)
            if self.row_scale is not None:
                self.row_scale.fill_(1)

    @property
    def owner(self) -> "Seeded":
        """The module that holds the tensors: this one, unless it is tied to another."""
        return self._owner[0] if self._owner else self

    @property
    def matrix(self) -> SeedMatrix:
        """The seed matrix; it shares this module's tensors.

        Raises:
            RbeError: the tensors that were loaded do not fit the specification.
        """
        return SeedMatrix(self.spec, self.seeds, self.scale, self.row_scale)

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded now and forgotten afterwards; read-only, shaped like the replaced layer's."""
        rows, columns = self.spec.shape
        if self.seeds.is_meta:
            dense = torch.empty(rows, columns, dtype=self.weight_dtype, device="meta")
        else:
            with torch.no_grad():
                dense = kernels.decode(self.spec, self.seeds, self.scale, self.row_scale).to(self.weight_dtype)
        dense = dense.T if self.transposed else dense
        dense._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers would otherwise initialise it
        return dense

    def _adopt(self, matrix: SeedMatrix) -> None:
        """Take over the tensors of an encoded matrix."""
        self.seeds, self.scale, self.row_scale = matrix.seeds, matrix.scale, matrix.row_scale

    def _ready(self) -> kernels.Prepared:
        """The matrix, checked once and ready for the kernels; made anew when a tensor was moved or replaced."""
        owner = self._owner[0] if self._owner else self
        tensors = owner._buffers
        seeds, scale, row_scale = tensors["seeds"], tensors["scale"], tensors["row_scale"]
        assert seeds is not None and scale is not None
        if torch.compiler.is_compiling():  # a traced binding must not outlive the trace
            return kernels.prepare(self.spec, seeds, scale, row_scale)
        prepared = owner._prepared
        if prepared is None or not prepared.fits(seeds, scale, row_scale):
            prepared = owner._prepared = kernels.prepare(self.spec, seeds, scale, row_scale)
        return prepared

    def __getattr__(self, name: str) -> Any:
        if name in _STORED and self._owner:
            return getattr(self._owner[0], name)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a binding holds raw addresses

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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in ("scale", "row_scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            # .half() and .to(bfloat16) cast every float buffer; the scales keep their dtype and exact value.
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        self._prepared = None
        return self

    def _describe(self) -> str:
        stored = sum(t.numel() * t.element_size() for t in (self.seeds, self.scale, self.row_scale) if t is not None)
        rate = 8 * stored / (self.spec.shape[0] * self.spec.shape[1])
        tied = ", tied" if self._owner else ""
        return f"format={self.spec.format}, bits={self.spec.bits:g} ({rate:.3g} stored){tied}"


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
