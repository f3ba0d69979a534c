"""Which tensor becomes seeds, in which format and rate, and which stays as it is, with the reason."""

import difflib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal, Self, TypedDict

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import Rate, SeedSpec, trellis
from rbe.metrics import shannon_floor
from rbe.nn.swap import Site, matches
from rbe.outliers import BYTES
from rbe.shards import FLOATS, SIZES

Kind = Literal["linear", "embedding", "conv", "recurrent", "keep"]
# Padding to whole blocks can eat the gain of a thin matrix; one that shrinks by less than this is kept, exactly.
LEAST_GAIN = 2
# Every outlier takes 48 bits.
MOST_OUTLIERS = 0.25
_EMBEDDING_WORDS = ("emb", "wte", "wpe")


@dataclass(frozen=True)
class Entry:
    """What happens to one tensor of the source.

    Attributes:
        name: of the tensor in the source.
        kind: "linear", "embedding", "conv" or "recurrent" where it becomes seeds, "keep" where it is copied.
        shape: in the source, as stored there.
        dtype: in the source, as safetensors names it ("F32", "BF16", ...).
        spec: of the seeds; None where it is kept. The encoder fills in the rotation.
        row_scale: a float16 factor per row is stored too.
        transposed: the source stores (in, out), so the seeds hold its transpose.
        reason: why it is kept.
        outliers: how many single weights, the largest, are kept beside the seeds.
        stored: False where the folder needs no copy: it is tied to a tensor that is there, or models ignore it.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    spec: SeedSpec | None = None
    row_scale: bool = False
    transposed: bool = False
    reason: str = ""
    stored: bool = True
    outliers: int = 0

    @property
    def module(self) -> str:
        """Path of the module that has the tensor as its weight; the tensor's own name where it is called otherwise."""
        return self.name.removesuffix(".weight")

    @property
    def weights(self) -> int:
        """Number of elements."""
        count = 1
        for side in self.shape:
            count *= side
        return count

    @property
    def source_bytes(self) -> int:
        """Bytes in the source."""
        return self.weights * SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes that will be stored, file headers apart."""
        if not self.stored:
            return 0
        return self.source_bytes if self.spec is None else seed_bytes(self.spec, self.row_scale, self.outliers)

    @property
    def format(self) -> str:
        """Format and rate, for tables."""
        if self.spec is None:
            return self.dtype if self.stored else "-"
        return label(self.spec, self.outliers / self.weights)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that survives JSON."""
        return {**asdict(self), "shape": list(self.shape), "spec": None if self.spec is None else self.spec.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            RbeError: it is no entry of a plan.
        """
        try:
            spec = None if data["spec"] is None else SeedSpec.from_json(data["spec"])
            return cls(**{**data, "shape": tuple(data["shape"]), "spec": spec})
        except (KeyError, TypeError) as cause:
            raise RbeError(f"plan: {data!r} is no entry of a plan ({cause}); the file is damaged or newer") from cause


@dataclass(frozen=True)
class Plan:
    """What happens to every tensor of a model, in the source's order.

    >>> plan = make_plan({"a.weight": ((64, 64), "F32"), "a.bias": ((64,), "F32")})
    >>> print(plan)
    tensor    kind    shape  format         bytes  remark
    a.weight  linear  64x64  trellis 2 bit   1028
    a.bias    keep    64     F32              256  it is no matrix
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def seeded(self) -> tuple[Entry, ...]:
        """The entries that become seeds."""
        return tuple(entry for entry in self.entries if entry.spec is not None)

    @property
    def weights(self) -> int:
        """Elements of all tensors of the source that are stored, each counted once."""
        return sum(entry.weights for entry in self.entries if entry.stored)

    @property
    def nbytes(self) -> int:
        """Bytes that will be stored, file headers apart."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(entry.source_bytes for entry in self.entries)

    def __str__(self) -> str:
        rows = [("tensor", "kind", "shape", "format", "bytes", "remark")]
        for entry in self.entries:
            shape = "x".join(map(str, entry.shape)) or "scalar"
            remark = entry.reason or ("transposed" if entry.transposed else "")
            rows.append((entry.name, entry.kind, shape, entry.format, str(entry.nbytes), remark))
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(w) if k == 4 else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=False))
            ]
            lines.append("  ".join([*cells, row[5]]).rstrip())
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that survives JSON."""
        return {"entries": [entry.to_json() for entry in self.entries]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            RbeError: it is no plan.
        """
        try:
            return cls(tuple(Entry.from_json(entry) for entry in data["entries"]))
        except (KeyError, TypeError) as cause:
            raise RbeError(f"plan: this is no plan ({cause}); the file is damaged or newer") from cause


def label(spec: SeedSpec, outliers: float = 0.0) -> str:
    """Format and rate in a few words, for tables.

    >>> label(formats.make_spec("trellis", (64, 64), bits=1.5))
    'trellis 1.5 bit'
    >>> label(formats.make_spec("packed128", (64, 64), stages=2))
    'packed128 radial 16x16 x2, 1 bit'

    Args:
        outliers: share of the weights that is kept beside the seeds.
    """
    more = f" + {100 * outliers:.2g} %" if outliers else ""
    if not formats.is_disk(spec.format):
        rates = [f"{bits:g}" for _, bits in spec.grades]
        steps = f" ({', '.join(rates)})" if rates else ""
        return f"{spec.format} {spec.bits:.4g} bit{steps}{more}"
    words = [spec.format]
    words += [spec.mode] if spec.mode else []
    words += [f"Q0.{spec.precision}"] if spec.format == "packed64" and spec.precision != 32 else []
    words += ["whole" if spec.block is None else f"{spec.block}x{spec.block}"]
    words += [f"x{spec.stages}"] if spec.stages > 1 else []
    return f"{' '.join(words)}, {spec.bits:.3g} bit{more}"


def floor(spec: SeedSpec) -> float:
    """The least relative squared error of Gaussian weights at the rate of a matrix, 2^(-2R); of grades, their mean.

    >>> floor(formats.make_spec("trellis", (64, 64), bits=2))
    0.0625

    Source: Shannon's rate-distortion bound.
    """
    return sum(shannon_floor(part.bits) * part.blocks for _, part in spec.parts) / spec.blocks


def seed_bytes(spec: SeedSpec, row_scale: bool = False, outliers: int = 0) -> int:
    """Bytes of the stored tensors of a seed matrix: seeds, scale, row scales and outliers.

    >>> seed_bytes(SeedSpec("trellis", (40, 33), bits=2.0))
    580
    """
    seeds = 8 * math.prod(formats.seeds_shape(spec))
    return seeds + 4 + (2 * spec.shape[0] if row_scale else 0) + BYTES * outliers


def make_plan(
    tensors: Mapping[str, tuple[Sequence[int], str]],
    modules: Mapping[str, Site] | None = None,
    *,
    bits: float | None = None,
    embeddings_bits: float | None = None,
    rates: Mapping[str, Rate] | None = None,
    format: str = "trellis",
    block: int | None = 16,
    window: int = 16,
    mode: str | None = None,
    precision: int = 32,
    stages: int = 1,
    outliers: float | None = None,
    extremes: Mapping[str, int] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
) -> Plan:
    """Decide for every tensor whether it becomes seeds.

    Args:
        tensors: name to (shape, dtype as safetensors names it).
        modules: what the layer is that has the tensor `<key>.weight`, from `rbe.nn.swap.find`. Without it, matrices
            called `*weight*` are taken, as embeddings where the name says so, and so are the weights of convolutions.
        bits: rate of linear layers, bits per weight; None is 2 for a trellis. The other formats have the rate of their
            block, and refuse another.
        embeddings_bits: rate of embeddings, and of heads tied to them; None is `bits`, 0 keeps them as they are.
        rates: shell patterns of tensor or module names, with the rate of what they fit; of several, the last one. The
            rate of an embedding may be grades, ((2048, 3), (None, 1)): bits up to a row, and of the rest.
        format, block, window, mode, precision, stages: of all seeds, as in `SeedSpec`.
        outliers: share of every matrix, its largest weights, that is kept beside the seeds as float16 with positions;
            None keeps those that are extreme in linear layers of a trellis.
        extremes: how many weights of a tensor are extreme (`rbe.outliers`), where it is known.
        include: shell patterns of tensor or module names; when given, everything else is kept.
        exclude: shell patterns of tensor or module names that are kept.
        tied: tensors that need not be stored, with the tensor that holds the same.
        ignored: tensors that need not be stored because the architecture ignores them.

    Raises:
        RbeError: a rate is not offered, or a pattern fits nothing.
    """
    rates = dict(rates or {})
    _check_patterns(tensors, include, exclude, list(rates))
    form: Form = {"format": format, "block": block, "mode": mode, "precision": precision, "stages": stages}
    window = 16 if formats.is_disk(format) else window
    if outliers is not None and not (isinstance(outliers, Real) and 0.0 <= outliers <= MOST_OUTLIERS):
        raise RbeError(f"outliers: {outliers} is no share of the weights from 0 to {MOST_OUTLIERS}; try 0.005")
    rate_of = _rates(form, window, bits, embeddings_bits, rates)
    entries = []
    for name, (sides, dtype) in tensors.items():
        shape = tuple(int(side) for side in sides)
        if tied and name in tied:
            entries.append(Entry(name, "keep", shape, dtype, reason=f"tied to {tied[name]}", stored=False))
            continue
        if name in ignored:
            reason = "the architecture ignores it"
            entries.append(Entry(name, "keep", shape, dtype, reason=reason, stored=False))
            continue
        site = _site(name, shape, modules)
        reason = _reason(name, shape, dtype, site, include, exclude)
        rate = rate_of(name, site.kind)
        if not reason and rate == 0:
            reason = "embeddings are kept" if site.kind == "embedding" else "its rate is 0"
        if not reason and site.kind != "keep":
            if isinstance(rate, tuple):
                rate = _graded(name, rate, site)
            spec = formats.make_spec(shape=site.shape, bits=rate, window=window, **form)
            if outliers is not None:
                count = round(outliers * spec.shape[0] * spec.shape[1])
            else:
                extreme = site.kind == "linear" and not formats.is_disk(format)
                count = (extremes or {}).get(name, 0) if extreme else 0
            entry = Entry(
                name, site.kind, shape, dtype, spec, site.kind == "embedding", site.transposed, outliers=count
            )
            if LEAST_GAIN * entry.nbytes <= entry.source_bytes:
                entries.append(entry)
                continue
            reason = f"too thin: seeds would take {entry.nbytes} bytes of {entry.source_bytes}"
        entries.append(Entry(name, "keep", shape, dtype, reason=reason))
    return Plan(tuple(_together(entries, modules or {})))


def _graded(name: str, grades: tuple[tuple[int | None, float], ...], site: Site) -> Rate:
    """Grades that fit the rows of a table.

    Raises:
        RbeError: it is no embedding, whose rows alone mean something, or the last rows are not mentioned.
    """
    if site.kind != "embedding":
        raise RbeError(f"rates: {name} is no embedding, and only the rows of one can have several rates: give one")
    rows = site.shape[0]
    if grades[-1][0] is not None and grades[-1][0] < rows:
        raise RbeError(
            f"rates: the grades of {name} end at row {grades[-1][0]} of {rows}; say what the rest gets: (None, bits)"
        )
    inside = tuple(grade for grade in grades[:-1] if grade[0] is not None and grade[0] < rows)
    return (*inside, (rows, grades[len(inside)][1]))


def _together(entries: list[Entry], modules: Mapping[str, Site]) -> Iterator[Entry]:
    """The matrices of a recurrent layer become seeds all, or none does."""
    groups = {name: site.group for name, site in modules.items() if site.group}
    kept = {group: e for e in entries if (group := groups.get(e.module)) is not None and e.spec is None}
    for entry in entries:
        group = groups.get(entry.module)
        if group in kept and entry.spec is not None:
            reason = f"{kept[group].name} of the same layer is kept ({kept[group].reason})"
            entry = Entry(entry.name, "keep", entry.shape, entry.dtype, reason=reason)
        yield entry


class Form(TypedDict, total=False):
    """Everything of a specification that is the same for all matrices of a model, as in `SeedSpec`."""

    format: str
    block: int | None
    mode: str | None
    precision: int
    stages: int


def usual_rate(bits: float | None, form: Form) -> float | None:
    """The rate of linear layers: what was asked, or what the format has; None where it differs from matrix to matrix.

    >>> usual_rate(None, {"format": "trellis"}), usual_rate(None, {"format": "packed128", "block": 8})
    (2.0, 2.0)
    """
    side = form.get("block", 16)
    if side is None:
        return None
    return formats.make_spec(shape=(side, side), bits=bits, **form).bits


def _rates(
    form: Form, window: int, bits: float | None, embeddings_bits: float | None, rates: Mapping[str, Rate]
) -> Callable[[str, str], Rate | None]:
    """What gives the rate of (tensor, kind): 0 to keep it, None where the block decides; all rates are offered."""
    every = {"bits": bits, "embeddings_bits": embeddings_bits, **{f"rate of {k!r}": v for k, v in rates.items()}}
    block = form["block"]
    given = [(name, bits) for name, rate in every.items() for bits in _single(name, rate)]
    for name, rate in given:
        if rate is None or (rate == 0 and embeddings_bits == 0):
            continue
        if not isinstance(rate, Real):
            raise RbeError(f"{name}: {rate!r} is no number of bits; give one, for instance 2")
        if not formats.is_disk(form["format"]):
            formats.make_spec(shape=(16, 16), bits=float(rate), window=window, **form)
            continue
        if block is None:
            raise RbeError(
                f"{name}: {rate:g} bits cannot be asked of {form['format']} with one block a matrix, whose rate "
                "follows from the size of each matrix; leave it out"
            )
        fixed = formats.make_spec(shape=(block, block), **form).bits
        if rate != fixed:
            raise RbeError(
                f"{name}: {rate:g} bits cannot be asked of {form['format']}, whose rate follows from its block: "
                f"{block}x{block} with {form['stages']} seed(s) a block is {fixed:g} bits a weight; leave it out, or "
                "choose another block or number of stages"
            )
    if block is not None or not formats.is_disk(form["format"]):
        side = max(1, block) if isinstance(block, int) else 16  # the specification refuses any other
        formats.make_spec(shape=(side, side), window=window, **form)

    def rate_of(name: str, kind: str) -> Rate | None:
        chosen = [rate for pattern, rate in rates.items() if matches(name.removesuffix(".weight"), [pattern])]
        rate: Any = embeddings_bits if kind == "embedding" and embeddings_bits is not None else bits
        rate = chosen[-1] if chosen else rate
        if isinstance(rate, list | tuple):
            return tuple((end, float(one)) for end, one in rate)
        return None if rate is None or (formats.is_disk(form["format"]) and rate != 0) else float(rate)

    return rate_of


def _single(name: str, rate: Any) -> list[Any]:
    """The rates of a table's grades, or the one that there is.

    Raises:
        RbeError: grades that do not rise, or are no pairs.
    """
    if not isinstance(rate, list | tuple):
        return [rate]
    try:
        ends = [end for end, _ in rate]
        last = math.inf if ends[-1] is None else ends[-1]
        rising = all(type(a) is int and 0 < a < b for a, b in itertools.pairwise([*ends[:-1], last]))
        if not rising or any(end % trellis.BLOCK for end in ends[:-1]):
            raise ValueError(f"their ends must rise, in steps of {trellis.BLOCK} rows")
        return [bits for _, bits in rate]
    except (TypeError, ValueError, IndexError) as cause:
        raise RbeError(f"{name}: {rate!r} are no grades, such as ((2048, 3), (None, 1)): {cause}") from cause


def _check_patterns(names: Iterable[str], include: Sequence[str], exclude: Sequence[str], rates: Sequence[str]) -> None:
    modules = sorted({name.removesuffix(".weight") for name in names})
    for option, patterns in (("include", include), ("exclude", exclude), ("rates", rates)):
        if isinstance(patterns, str):
            raise RbeError(f"{option}: {patterns!r} is text; give a list of patterns, [{patterns!r}]")
        for pattern in patterns:
            if any(matches(module, [pattern]) for module in modules):
                continue
            words = {word for module in modules for word in (module, *module.split("."))}
            close = difflib.get_close_matches(pattern.strip("*."), sorted(words), n=4, cutoff=0.5)
            hint = f"names like it are {', '.join(close)}" if close else f"there are {', '.join(modules[:4])}, ..."
            raise RbeError(
                f"{option}: {pattern!r} fits no tensor; {hint}; patterns are shell patterns of whole names, such as "
                f"'*{(close or modules or ['query'])[0]}*'"
            )


def _site(name: str, shape: tuple[int, ...], modules: Mapping[str, Site] | None) -> Site:
    """What the layer of a tensor is, as far as is known."""
    module = name.removesuffix(".weight")
    sides = (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (0, 0)
    if modules is not None:
        known = modules.get(module)
        return known or Site(module, "keep", sides, reason="no layer that seeds can replace has it as its weight")
    if "weight" not in name.rpartition(".")[2]:
        return Site(module, "keep", sides, reason="it is not called *weight*")
    if len(shape) > 2:
        return Site(module, "conv", sides)
    embedding = any(word in module.lower() for word in _EMBEDDING_WORDS)
    return Site(module, "embedding" if embedding else "linear", sides)


def _reason(
    name: str, shape: tuple[int, ...], dtype: str, site: Site, include: Sequence[str], exclude: Sequence[str]
) -> str:
    """Why a tensor is kept; empty where it can become seeds."""
    module = name.removesuffix(".weight")
    if len(shape) < 2:
        return "it is no matrix"
    if min(shape) == 0:
        return "it is empty"
    if dtype not in FLOATS:
        return f"{dtype} is not a dtype that can be encoded"
    if site.kind == "keep":
        return site.reason or "no layer that seeds can replace has it as its weight"
    given = shape[::-1] if site.transposed else (shape[0], math.prod(shape[1:]))
    if given != site.shape or (len(shape) > 2) != (site.kind == "conv"):
        return f"the model's layer is {site.shape[0]}x{site.shape[1]}, this is another shape"
    if matches(module, exclude) or matches(name, exclude):
        return "excluded"
    if include and not (matches(module, include) or matches(name, include)):
        return "not included"
    return ""
