"""The transformers plug-in: importing this module lets `from_pretrained` read compressed folders.

    import rbe.hf
    model = transformers.AutoModel.from_pretrained("minilm-2bit")

Without the import transformers warns that it does not know the method, and raises over a tensor that is there for this
(`rbe.checkpoint.guard_names`).
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as with_values
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rbe import checkpoint, formats
from rbe.allocate import LEAST_GAIN, Entry
from rbe.checkpoint.write import header_metadata
from rbe.compress import encode_entry, plan_model
from rbe.errors import RbeError
from rbe.fingerprint import answer, difference
from rbe.formats import Rate, SeedSpec
from rbe.nn import Seeded, set_activations, swap
from rbe.outliers import Outliers
from rbe.shards import dtype_name
from rbe.source import Names, architecture

METHOD = checkpoint.METHOD
FORMAT_VERSION = checkpoint.FORMAT_VERSION


class RbeConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed model, and the argument that makes `from_pretrained` encode while loading.

    >>> RbeConfig(bits=2, exclude=["lm_head"]).to_dict()["exclude"]
    ['lm_head']

    Args:
        bits: rate of the linear layers, bits per weight; None is 2 for a trellis, and what the block gives otherwise.
        effort: "fast", "balanced" or "best" (encoding only).
        include, exclude: shell patterns of module paths (encoding only).
        embeddings_bits: rate of embeddings and of heads tied to them; None is `bits`, 0 keeps them dense.
        rates: shell patterns of module paths, with the rate of what they fit (encoding only).
        format, block, mode, precision, stages: of all seeds, as in `SeedSpec` (encoding only).
        outliers: share of the weights, the largest ones, that is kept beside the seeds; None keeps extreme ones
            of linear layers (encoding only).
        modules: what each seed layer of the file is; written by the library.
        format_version: of the seeds; written by the library.

    Raises:
        RbeError: the file was written by a later version.
    """

    def __init__(
        self,
        bits: float | None = None,
        effort: str = "balanced",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        embeddings_bits: float | None = None,
        rates: Mapping[str, Rate] | None = None,
        format: str = "trellis",
        block: int | None = 16,
        mode: str | None = None,
        precision: int = 32,
        stages: int = 1,
        outliers: float | None = None,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        **more: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise RbeError(
                f"this folder has seeds of format version {format_version}; this rbe reads version {FORMAT_VERSION}: "
                "install the rbe that wrote it, or a later one"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.bits = bits
        self.effort = effort
        self.include = list(include)
        self.exclude = list(exclude)
        self.embeddings_bits = embeddings_bits
        self.rates = dict(rates or {})
        self.outliers = outliers
        self.format, self.block, self.mode, self.precision, self.stages = format, block, mode, precision, stages
        self.modules = dict(modules or {})
        more.pop("quant_method", None)
        for name, value in more.items():  # kept, so that a folder survives being saved again
            setattr(self, name, value)


class _Encode(ConversionOps):
    """Turns one dense weight into seeds as soon as the loader has read it."""

    def __init__(self, quantizer: "RbeQuantizer") -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """The tensors of `input_dict`, weights to be encoded replaced by the seed layer's tensors."""
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if name in self.quantizer.pending and self.quantizer.failure is None:
                missing = set() if missing_keys is None else missing_keys
                try:
                    out.update(self.quantizer.encode(model, name, tensor, missing))
                except RbeError as cause:
                    # The loader would turn it into text of its log: it is raised when loading ends.
                    self.quantizer.failure = RbeError(f"{name}: {cause}")
            elif name in self.quantizer.pending:
                pass  # nothing more is encoded
            else:
                out[name] = tensor
        return out


class RbeQuantizer(HfQuantizer):
    """Puts seed layers into a transformers model while it is loaded, and describes them when it is saved."""

    requires_calibration = False
    quantization_config: RbeConfig

    def __init__(self, quantization_config: RbeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pending: dict[str, tuple[Entry, swap.Site]] = {}
        self.failure: RbeError | None = None
        self._digest: dict[str, str] = {}

    @property
    def is_trainable(self) -> bool:
        """Seeds are not trained through the Trainer."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The product is an operator that torch.compile keeps whole."""
        return True

    def is_serializable(self) -> bool:
        """Seed layers are ordinary modules with buffers."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse placements that cannot work.

        Raises:
            RbeError: layers would be offloaded to disk.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise RbeError("from_pretrained: device_map offloads to disk; seed layers are small: keep them in memory")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            _place(model, self.quantization_config.modules, _stored_names(checkpoint_files))
            return
        config = self.quantization_config
        _refuse_unknown(config)
        plan, sites = plan_model(
            model,
            config.bits,
            config.effort,
            config.include,
            config.exclude,
            config.embeddings_bits,
            config.rates,
            config.outliers or 0.0,  # extreme weights are found when they are there
            format=config.format,
            block=config.block,
            mode=config.mode,
            precision=config.precision,
            stages=config.stages,
        )
        for entry in plan.seeded:
            site = sites[entry.name]
            self.pending.update(dict.fromkeys(site.tensors, (entry, site)))

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether this tensor is a dense weight to be encoded."""
        return not self.pre_quantized and param_name in self.pending

    def get_quantize_ops(self) -> _Encode:
        """The operation that encodes one weight."""
        return _Encode(self)

    def encode(self, model: nn.Module, name: str, weight: Tensor, missing: set[str]) -> dict[str, Tensor]:
        """Encode one weight, swap its layers, and return the tensors for the loader to put in place."""
        entry, site = self.pending[name]
        missing.difference_update(site.tensors)
        digest = hashlib.sha256(weight.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        if isinstance(model.get_submodule(site.module), Seeded):
            if self._digest[site.module] == digest:
                return {}  # the file holds the tied weight twice
            raise RbeError(
                f"{name} differs from {site.tensor}, but the configuration ties them; "
                "set tie_word_embeddings=False in the source's config.json"
            )
        assert entry.spec is not None
        dense = checkpoint.as_matrix(weight, entry.spec, site.transposed)
        config = self.quantization_config
        if config.outliers is None and entry.kind == "linear" and not formats.is_disk(entry.spec.format):
            entry = with_values(entry, outliers=Outliers.extremes(dense), dtype=dtype_name(weight.dtype))
            if LEAST_GAIN * entry.nbytes > entry.source_bytes:
                return {name: weight}  # with these beside, seeds are too large
        self._digest[site.module] = digest
        matrix = encode_entry(entry, dense, config.effort)
        swap.place(model, site, matrix.spec, matrix.row_scale is not None, entry.outliers)
        return {f"{site.module}.{key}": value for key, value in matrix.to_tensors().items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.failure is not None:
            raise self.failure
        for path, module in model.named_modules():
            if isinstance(module, Seeded) and module.owner is module:
                try:
                    _ = module.matrix  # looks at every number that a file can have wrong
                except RbeError as cause:
                    raise RbeError(f"{path}: {cause}") from cause
        self.quantization_config.modules = swap.describe(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Bring the description up to date with the model, and repeat it in every file's header; pack open seeds."""
        modules = self.quantization_config.modules = swap.describe(model)
        opened = any(isinstance(module, Seeded) and module.trainable for module in model.modules())
        state = swap.packed_state(model) if opened else model.state_dict()
        state.update({name: torch.empty(0) for name in checkpoint.guard_names(modules)})
        return state, header_metadata({name: entry["spec"] for name, entry in modules.items()})

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        # Saving a model turns its configuration's dtype into text.
        return swap.decompress_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _register() -> None:
    # Registering twice is an error in transformers; a reloaded module replaces itself instead.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    auto.register_quantization_config(METHOD)(RbeConfig)
    auto.register_quantizer(METHOD)(RbeQuantizer)


_register()


def _refuse_unknown(config: RbeConfig) -> None:
    """What is not known would be forgotten without a word."""
    known = {"quant_method", *inspect.signature(RbeConfig.__init__).parameters}
    unknown = sorted(set(vars(config)) - known)
    if unknown:
        raise RbeError(
            f"RbeConfig: {', '.join(unknown)} cannot be asked of encoding while loading; leave it out, or use `rbe "
            "compress`, which has also allocate and calibrate, and load its folder"
        )


def _stored_names(files: Sequence[str] | None) -> set[str]:
    """Names of all tensors in the shards."""
    names: set[str] = set()
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as shard:
                names.update(shard.keys())
    return names


def _expected_names(modules: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Names of the tensors of all seed layers in a file."""
    for name, entry in modules.items():
        spec = SeedSpec.from_json(entry["spec"])
        yield from checkpoint.expected(name, spec, bool(entry.get("row_scale", False)), int(entry.get("outliers", 0)))


def _place(model: nn.Module, modules: dict[str, dict[str, Any]], stored: set[str]) -> None:
    """Put the file's seed layers, unfilled, into a model on the meta device."""
    lost = [name for name in _expected_names(modules) if stored and name not in stored]
    if lost:  # transformers would warn, and go on with whatever is in memory
        raise RbeError(
            f"from_pretrained: the folder does not hold {', '.join(lost[:3])}, which its configuration promises; fetch "
            "the folder again"
        )
    names = Names(model)
    _pass_over_guards(model, names, modules)
    entries = {path: entry for name, entry in modules.items() if (path := _path(names, name)) is not None}
    kept = {_path(names, name.removesuffix(".weight")) for name in stored if name.endswith(".weight")}
    sites = {path: site for site in swap.find(model) for path in site.names}
    for path, entry in entries.items():
        site = sites.get(path)
        if site is None or site.kind == "keep":
            reason = "it is no such layer" if site is None else site.reason
            raise RbeError(f"{path}: the folder holds seeds for it, but this model cannot: {reason}")
        # A weight that the file stores again, dense or as other seeds, is not tied, whatever the configuration says.
        apart = {other for other in site.names if other != path and (other in entries or other in kept)}
        shared = tuple(other for other in site.names if other != path and other not in apart)
        swap.place(
            model,
            with_values(site, module=path, shared=shared),
            SeedSpec.from_json(entry["spec"]),
            bool(entry.get("row_scale", False)),
            int(entry.get("outliers", 0)),
        )


def _pass_over_guards(model: nn.Module, names: Names, modules: dict[str, dict[str, Any]]) -> None:
    """The tensors that keep transformers from loading without us are not to be reported as too many."""
    known: Any = model
    patterns = set(known._keys_to_ignore_on_load_unexpected or ())
    for guard in checkpoint.guard_names(modules):
        path = _path(names, guard.removesuffix(".weight"))
        # transformers reports names of the file, renamed or not, with the prefix of the base model or without.
        given = {guard} if path is None else {guard, f"{path.removeprefix(f'{names.prefix}.')}.weight"}
        patterns |= {rf"(^|\.){re.escape(name)}$" for name in given}
    known._keys_to_ignore_on_load_unexpected = patterns


def _path(names: Names, module: str) -> str | None:
    """The model's path of a module of the file, or None where this model has no such layer."""
    path = names.module(f"{module}.weight")
    return path if f"{path}.weight" in names.state else None


def load(
    folder: str | Path,
    activations: str = "float32",
    *,
    model_class: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a compressed transformers folder as the class its configuration names, in evaluation mode.

    Every byte is compared with its checksum first; a folder of `save_pretrained` alone has none.

    Args:
        folder: what `rbe compress`, `rbe.save` or `save_pretrained` wrote.
        activations: "float32" (exact) or "int8" (faster).
        model_class: another transformers class, for instance `transformers.AutoModel`.
        kwargs: for `from_pretrained`.

    Raises:
        RbeError: the folder is not a compressed transformers model.
        CorruptFile: anything was changed.
    """
    return _open(Path(folder), activations, model_class, check=True, **kwargs)


def _open(folder: Path, activations: str = "float32", model_class: Any = None, *, check: bool, **kwargs: Any) -> Any:
    config = _read_config(folder)
    about = config.get("quantization_config")
    if not isinstance(about, dict) or about.get("quant_method") != METHOD:
        raise RbeError(f"load: {folder} is not a compressed model (its config.json has no rbe quantization_config)")
    if check and checkpoint.has_checksums(folder):
        checkpoint.check_files(folder)
    if model_class is None:
        name = architecture(config) or "AutoModel"
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise RbeError(
                f"load: transformers {transformers.__version__} has no {name}; give model_class=, or install the "
                "version that has it"
            )
    model = model_class.from_pretrained(folder, local_files_only=True, **kwargs)
    # With output_loading_info=True it is a pair.
    set_activations(model[0] if isinstance(model, tuple) else model, activations)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise RbeError(f"load: there is no {path}; give the folder that `rbe compress` wrote") from None
    except (OSError, ValueError) as cause:
        raise RbeError(f"load: {path} cannot be read ({cause})") from cause
    if not isinstance(config, dict):
        raise RbeError(f"load: {path} is not a model configuration")
    return config


def attach(model: Any, **settings: Any) -> None:
    """Treat a model swapped after loading as one loaded so: `save_pretrained` and `dequantize` then work."""
    about = getattr(model.config, "quantization_config", None)
    if isinstance(about, dict) and about.get("quant_method") == METHOD:
        settings = {**{k: v for k, v in about.items() if k not in ("quant_method", "modules")}, **settings}
    config = RbeConfig(modules=swap.describe(model), **settings)
    quantizer = RbeQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def fingerprint(folder: str | Path) -> dict[str, Any]:
    """What the model in a folder answers to a fixed input: a few output values and their norm, for `check_fingerprint`.

    The input is made of our own integer mixing, so it is the same everywhere; the model runs in float32.

    Returns:
        {"class", "output", "shape", "values" (32 floats), "norm"}, ready for JSON.

    Raises:
        RbeError: the folder is not a compressed model, or it does not take token ids.
    """
    # Whoever asks has just written the folder, or checked it.
    return answer(_open(Path(folder), check=False, dtype=torch.float32))


def fingerprint_of(model: Any) -> dict[str, Any] | None:
    """The fingerprint that a loaded float32 model will have once saved; None where it would be another's, or none."""
    if model.dtype != torch.float32 or any(
        m.activations != "float32" for m in model.modules() if isinstance(m, Seeded)
    ):
        return None
    training = model.training
    try:
        return answer(model.eval())
    except RbeError:
        return None
    finally:
        model.train(training)


def check_fingerprint(
    folder: str | Path, expected: dict[str, Any] | None = None, tolerance: float = 2e-3
) -> str | None:
    """Compare what the model answers now with a stored fingerprint.

    Args:
        expected: what `fingerprint` returned when the folder was written; by default what its index says.
        tolerance: allowed difference in parts of the root mean square output. Instruction tiers sum in another order,
            which moves an output by about 1e-5 of it; random weights differ by more than 1.

    Returns:
        what is wrong; None where nothing is, or where no fingerprint was stored.
    """
    expected = expected or checkpoint.read_fingerprint(Path(folder))
    if expected is None:
        return None
    model, info = _open(Path(folder), check=False, dtype=torch.float32, output_loading_info=True)
    now = answer(model)
    lost = sorted(info["missing_keys"])
    wrong = difference(now, expected)
    if isinstance(wrong, str):
        return f"fingerprint: {wrong} when the folder was written"
    if not wrong <= tolerance:
        return (
            f"fingerprint: the model's outputs differ from those when the folder was written by {wrong:.2g} of their "
            f"size (allowed {tolerance:g}); "
            + (
                f"the folder lacks {', '.join(lost[:3])}, which transformers fills with random numbers"
                if lost
                else "the weights are not the ones that were stored"
            )
        )
    return None
