"""`compress_`: a live torch model, its layers replaced by seed layers in place; `decompress_`: the way back."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rbe import calibrate as statistics
from rbe import formats, search, sensitivity
from rbe.allocate import Entry, Form, Plan, make_plan, usual_rate
from rbe.budget import MIDDLE, allocate_bits, fixed_rates
from rbe.checkpoint import FORMAT_VERSION, METHOD
from rbe.errors import RbeError
from rbe.formats import Rate, SeedSpec
from rbe.matrix import SeedMatrix
from rbe.nn import Seeded, swap
from rbe.outliers import Outliers
from rbe.search.viterbi import EFFORTS
from rbe.shards import dtype_name


def plan_model(
    model: nn.Module,
    bits: float | None = None,
    effort: str = "balanced",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings_bits: float | None = None,
    rates: Mapping[str, Rate] | None = None,
    outliers: float | None = None,
    **form: Unpack[Form],
) -> tuple[Plan, dict[str, swap.Site]]:
    """What `compress_` would do, and the layers it would do it to; the model may be on the meta device.

    >>> plan, sites = plan_model(nn.Sequential(nn.Linear(64, 64)))
    >>> print(plan)
    tensor    kind    shape  format         bytes  remark
    0.weight  linear  64x64  trellis 2 bit   1028
    0.bias    keep    64     F32              256  it is no matrix

    Args:
        form: format, block, mode, precision and stages of all seeds, as in `SeedSpec`.

    Returns:
        (plan, sites by the name of the tensor that becomes seeds).

    Raises:
        RbeError: a rate or effort is not offered, a pattern fits nothing, or the model holds seeds already.
    """
    if any(isinstance(module, Seeded) for module in model.modules()):
        raise RbeError("compress: the model holds seeds already; decompress_ it first, or start from the dense model")
    if effort not in EFFORTS:
        raise RbeError(f"compress: effort {effort!r} is not offered; choose one of {', '.join(EFFORTS)}")
    sites = swap.find(model)
    if hasattr(model, "all_tied_weights_keys"):
        why = "the loader of transformers cannot put a recurrent layer in place"
        sites = [replace(site, kind="keep", reason=site.reason or why) if site.group else site for site in sites]
    tied = {name: site.tensor for site in sites for name in site.tensors[1:]}
    tensors = {
        name: (tuple(parameter.shape), dtype_name(parameter.dtype))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not isinstance(parameter, nn.parameter.UninitializedParameter)  # of a lazy layer
    }
    extremes = None
    if outliers is None:
        linear = ((site.tensor, swap.dense(model, site)) for site in sites if site.kind == "linear")
        extremes = {name: Outliers.extremes(weight) for name, weight in linear if not weight.is_meta}
    plan = make_plan(
        tensors,
        {site.tensor.removesuffix(".weight"): site for site in sites},
        extremes=extremes,
        bits=bits,
        embeddings_bits=embeddings_bits,
        rates=rates,
        window=EFFORTS[effort].window,
        include=include,
        exclude=exclude,
        tied=tied,
        outliers=outliers,
        **form,
    )
    by_name = {site.tensor: site for site in sites}
    return plan, {entry.name: by_name[entry.name] for entry in plan.seeded}


def encode_entry(
    entry: Entry,
    weight: Tensor,
    effort: str = "balanced",
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    moments: Tensor | None = None,
) -> SeedMatrix:
    """Encode one weight, (rows, columns) whatever its layer's layout, as a plan says."""
    assert entry.spec is not None, f"{entry.name} is kept"
    # The rows of an embedding are generated one by one, so they must not be mixed.
    rotate = "in" if entry.kind == "embedding" else True
    outliers = Outliers.largest(weight, entry.outliers) if entry.outliers else None
    matrix = search.encode(
        weight if outliers is None else outliers.taken_from(weight),
        effort=effort,
        row_scale=entry.row_scale,
        # Rotations of its own: what an encoder does to every matrix in the same way must not add up over the layers.
        seed=seed + zlib.crc32(entry.name.encode()),
        threads=threads,
        progress=progress,
        moments=moments,
        overwrite=outliers is not None,  # what is taken from is a copy
        **_options(entry.spec, rotate),
    )
    return matrix if outliers is None else replace(matrix, outliers=outliers)


def _options(spec: SeedSpec, rotate: bool | str) -> dict[str, Any]:
    """What the encoder of a format is asked for."""
    if not formats.is_disk(spec.format):
        return {"format": spec.format, "bits": spec.grades or spec.bits, "window": spec.window, "rotate": rotate}
    # Smooth blocks are what these formats can hold; a rotation would make noise of them.
    form = {"format": spec.format, "block": spec.block, "mode": spec.mode, "stages": spec.stages}
    return {**form, "precision": spec.precision, "rotate": False}


def compress_(
    model: nn.Module,
    bits: float | None = None,
    effort: str = "balanced",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings_bits: float | None = None,
    rates: Mapping[str, Rate] | None = None,
    progress: Callable[[int, int], object] | None = None,
    threads: int | None = None,
    *,
    format: str = "trellis",
    block: int | None = 16,
    mode: str | None = None,
    precision: int = 32,
    stages: int = 1,
    outliers: float | None = None,
    calibrate: str | Iterable[Any] | None = None,
    allocate: str | Iterable[Any] | None = None,
) -> Plan:
    """Replace the linear and embedding layers of a model, in place, by layers that hold seeds.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> plan = compress_(model, bits=2, effort="fast")
    >>> len(plan.seeded), type(model[0]).__module__
    (2, 'rbe.nn.linear')

    Args:
        model: any torch module with layers inside; shared modules and tied weights stay shared.
        bits: rate of linear layers, bits per weight: 0.5 to 4 in halves; None is 2. The formats packed64 and packed128
            have the rate of their block instead.
        effort: "fast", "balanced" or "best": how long the encoder searches.
        include: shell patterns of module paths; when given, everything else is kept.
        exclude: shell patterns of module paths that are kept.
        embeddings_bits: rate of embeddings, and of heads tied to them; None is `bits`, 0 keeps them.
        rates: shell patterns of module paths, with the rate of what they fit; of several that fit, the last one.
        progress: called with (weights done, weights in all).
        threads: of the encoder; None is torch's number.
        format, block, mode, precision, stages: of all seeds, as in `SeedSpec`.
        outliers: share of every matrix, its largest weights, that is kept beside the seeds, for instance 0.005; None
            keeps those of linear layers that are extreme, far larger than a normal distribution has them.
        calibrate: linear layers are encoded so that their outputs, not their weights, come near: "random" runs the
            model on random tokens (`rbe.calibrate.random_tokens`); otherwise what it is called with, batch by batch.
            All second moments are held at once, 8 columns^2 bytes a layer.
        allocate: `bits` is then the mean of the rates, and each matrix gets one by how much the model's answer hangs on
            it (`rbe.sensitivity`): "random" or inputs, as for `calibrate`. What `rates` or `embeddings_bits` name keeps
            the rate given there. The table of input tokens gets several: more for its first rows, which tokenizers
            give to frequent tokens.

    Returns:
        the plan that was carried out; printing it shows every tensor, and why one was kept.

    Raises:
        RbeError: a rate or pattern fits nothing, a weight is not finite, or the model holds seeds already. The model
            is then as it was: layers are exchanged only when every weight has been encoded.
    """
    form: Form = {"format": format, "block": block, "mode": mode, "precision": precision, "stages": stages}
    mean = MIDDLE if bits is None else bits
    start = bits if allocate is None else MIDDLE
    plan, sites = plan_model(model, start, effort, include, exclude, embeddings_bits, rates, outliers, **form)
    if allocate is not None:
        rates = _spread(model, plan, mean, embeddings_bits, rates or {}, allocate)
        plan, sites = plan_model(model, start, effort, include, exclude, embeddings_bits, rates, outliers, **form)
    moments = {} if calibrate is None else _moments(model, plan, sites, calibrate)
    total = sum(entry.weights for entry in plan.seeded)
    done = 0
    encoded = []
    for entry in plan.seeded:
        step = None if progress is None else (lambda part, _, before=done: progress(before + part, total))
        site = sites[entry.name]
        try:
            known = moments.get(entry.name)
            matrix = encode_entry(
                entry, swap.dense(model, site).cpu(), effort, threads=threads, progress=step, moments=known
            )
        except RbeError as cause:
            raise RbeError(f"{entry.name}: {cause}") from cause
        encoded.append((site, matrix))
        done += entry.weights
    for site, matrix in encoded:
        swap.replace(model, site, matrix)
    if hasattr(getattr(model, "config", None), "architectures"):
        # A transformers model: what `save_pretrained` writes must say how to read it.
        about = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "bits": mean if allocate else usual_rate(bits, form),
        }
        about |= {"effort": effort, **(form if formats.is_disk(format) else {})}
        about |= {} if outliers is None else {"outliers": outliers}
        model.config.quantization_config = {**about, "modules": swap.describe(model)}  # type: ignore[union-attr]
    return plan


def _moments(
    model: nn.Module, plan: Plan, sites: Mapping[str, swap.Site], inputs: str | Iterable[Any]
) -> dict[str, Tensor]:
    """Second moments of what linear layers read, by the names of their weights."""
    if any(entry.spec is not None and formats.is_disk(entry.spec.format) for entry in plan.seeded):
        raise RbeError("compress: calibrate is for the trellis; packed formats cannot use it: leave it out")
    paths = {e.name: sites[e.name].module for e in plan.seeded if e.kind == "linear" and e.name.endswith(".weight")}
    found = statistics.second_moments(model, sorted(set(paths.values())), _inputs(model, inputs, "calibrate"))
    if paths and not found:
        raise RbeError(
            f"compress: the answer of {type(model).__name__} has no gradient by the layers to be calibrated; let it "
            "run with gradients, or leave calibrate out"
        )
    return {name: found[path].cpu() for name, path in paths.items() if path in found}


def _spread(
    model: nn.Module,
    plan: Plan,
    mean: float,
    embeddings_bits: float | None,
    given: Mapping[str, Rate],
    inputs: str | Iterable[Any],
) -> dict[str, Rate]:
    """Rates by pattern: what is given, and for every other matrix one by how much the model's answer hangs on it."""
    if any(entry.spec is not None and formats.is_disk(entry.spec.format) for entry in plan.seeded):
        raise RbeError("compress: allocate is for the trellis; packed formats have one rate: leave it out")
    allocate_bits(plan, {}, mean)  # refuses a mean out of range before the long work
    weights = {entry.name: entry.row_scale for entry in plan.seeded}
    batches = _inputs(model, inputs, "allocate", **sensitivity.INPUTS)
    found = sensitivity.sensitivities(model, weights, batches)
    embed: Any = getattr(model, "get_input_embeddings", None)
    table = None if embed is None else embed().weight
    graded = [entry.name for entry in plan.seeded if table is not None and model.get_parameter(entry.name) is table]
    return {**allocate_bits(plan, found, mean, fixed_rates(embeddings_bits, given), graded), **given}


def _inputs(model: nn.Module, inputs: str | Iterable[Any], option: str, **options: Any) -> Iterable[Any]:
    """What to call the model with."""
    if isinstance(inputs, str):
        try:
            table: Any = model.get_input_embeddings()  # type: ignore[operator]
            vocabulary = int(table.weight.shape[0])
        except (AttributeError, NotImplementedError):
            vocabulary = 0
        if inputs != "random" or not vocabulary:
            raise RbeError(
                f"compress: {option}={inputs!r} does not fit a {type(model).__name__}; give 'random' for a model of "
                "tokens, or the inputs that the model is called with"
            )
        config = getattr(model, "config", None)
        batches = statistics.random_tokens(vocabulary, context=statistics.longest(config, 64), **options)
        every = statistics.for_both_sides(batches, config)
        return ({name: x.to(table.weight.device) for name, x in batch.items()} for batch in every)
    return inputs


def decompress_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every seed layer, in place, by the ordinary dense layer that computes the same.

    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> _ = compress_(model, effort="fast")
    >>> type(decompress_(model)[0])
    <class 'torch.nn.modules.linear.Linear'>

    Args:
        dtype: of the dense weights; by default each layer's own.

    Returns:
        the model.
    """
    swap.decompress_(model, dtype)
    config = getattr(model, "config", None)
    about = getattr(config, "quantization_config", None)
    if isinstance(about, dict) and about.get("quant_method") == METHOD:
        del config.quantization_config  # type: ignore[union-attr]
    elif getattr(about, "quant_method", None) == METHOD:
        model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr, operator]
    return model
