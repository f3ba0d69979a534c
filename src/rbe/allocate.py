"""Which tensor becomes seeds, in which format and rate, and which stays as it is, with the reason."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from rbe import formats
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.nn.swap import Site, matches
from rbe.shards import FLOATS, SIZES

Kind = Literal["linear", "embedding", "keep"]
# Padding to whole blocks can eat the gain of a thin matrix; one that shrinks by less than this is kept, exactly.
LEAST_GAIN = 2
_EMBEDDING_WORDS = ("emb", "wte", "wpe")


@dataclass(frozen=True)
class Entry:
    """What happens to one tensor of the source.

    Attributes:
        name: of the tensor in the source.
        kind: "linear" or "embedding" where it becomes seeds, "keep" where it is copied.
        shape: in the source, as stored there.
        dtype: in the source, as safetensors names it ("F32", "BF16", ...).
        spec: of the seeds; None where it is kept. The encoder fills in the rotation.
        row_scale: a float16 factor per row is stored too.
        transposed: the source stores (in, out), so the seeds hold its transpose.
        reason: why it is kept.
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

    @property
    def module(self) -> str:
        """Path of the module that has the tensor as its weight."""
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
        return self.source_bytes if self.spec is None else seed_bytes(self.spec, self.row_scale)

    @property
    def format(self) -> str:
        """Format and rate, for tables."""
        if self.spec is None:
            return self.dtype if self.stored else "-"
        return f"{self.spec.format} {self.spec.bits:g} bit"

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


def seed_bytes(spec: SeedSpec, row_scale: bool = False) -> int:
    """Bytes of the stored tensors of a seed matrix: seeds, scale and row scales.

    >>> seed_bytes(SeedSpec("trellis", (40, 33), bits=2.0))
    580
    """
    return 8 * formats.get(spec.format).words(spec) * spec.blocks + 4 + (2 * spec.shape[0] if row_scale else 0)


def make_plan(
    tensors: Mapping[str, tuple[Sequence[int], str]],
    modules: Mapping[str, Site] | None = None,
    *,
    bits: float = 2,
    embeddings_bits: float | None = None,
    rates: Mapping[str, float] | None = None,
    format: str = "trellis",
    block: int = 16,
    window: int = 16,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
) -> Plan:
    """Decide for every tensor whether it becomes seeds.

    Args:
        tensors: name to (shape, dtype as safetensors names it).
        modules: what the layer is that has the tensor `<key>.weight`, from `rbe.nn.swap.find`. Without it, matrices
            called `*.weight` are taken, as embeddings where the name says so.
        bits: rate of linear layers, bits per weight.
        embeddings_bits: rate of embeddings, and of heads tied to them; None is `bits`, 0 keeps them as they are.
        rates: shell patterns of tensor or module names, with the rate of what they fit; of several, the last one.
        format, block, window: of all seeds.
        include: shell patterns of tensor or module names; when given, everything else is kept.
        exclude: shell patterns of tensor or module names that are kept.
        tied: tensors that need not be stored, with the tensor that holds the same.
        ignored: tensors that need not be stored because the architecture ignores them.

    Raises:
        RbeError: a rate is not offered, or a pattern fits nothing.
    """
    rates = dict(rates or {})
    _check_patterns(tensors, include, exclude, list(rates))
    usual = {"linear": float(bits), "embedding": float(bits if embeddings_bits is None else embeddings_bits)}
    for rate in (*usual.values(), *rates.values()):
        if not (rate == 0 and rate == usual["embedding"]):
            formats.get(format).check(SeedSpec(format, (block, block), rate, block, window))
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
        chosen = [rate for pattern, rate in rates.items() if matches(name.removesuffix(".weight"), [pattern])]
        rate = float(chosen[-1]) if chosen else usual.get(site.kind, 0.0)
        if not reason and site.kind == "embedding" and rate == 0:
            reason = "embeddings are kept"
        if not reason:
            spec = SeedSpec(format, site.shape, rate, block, window)
            row_scale = site.kind == "embedding"
            entry = Entry(name, site.kind, shape, dtype, spec, row_scale, site.transposed)
            if LEAST_GAIN * entry.nbytes <= entry.source_bytes:
                entries.append(entry)
                continue
            reason = f"too thin: seeds would take {entry.nbytes} bytes of {entry.source_bytes}"
        entries.append(Entry(name, "keep", shape, dtype, reason=reason))
    return Plan(tuple(entries))


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
    sides = shape if len(shape) == 2 else (0, 0)
    if modules is not None:
        known = modules.get(module) if name != module else None
        return known or Site(module, "keep", sides, reason="no layer that seeds can replace has it as its weight")
    if name == module or not module:
        return Site(module, "keep", sides, reason="it is not called *.weight")
    embedding = any(word in module.lower() for word in _EMBEDDING_WORDS)
    return Site(module, "embedding" if embedding else "linear", sides)


def _reason(
    name: str, shape: tuple[int, ...], dtype: str, site: Site, include: Sequence[str], exclude: Sequence[str]
) -> str:
    """Why a tensor is kept; empty where it can become seeds."""
    module = name.removesuffix(".weight")
    given = shape[::-1] if site.transposed else shape
    if len(shape) != 2:
        return "it is no matrix"
    if min(shape) == 0:
        return "it is empty"
    if dtype not in FLOATS:
        return f"{dtype} is not a dtype that can be encoded"
    if site.kind == "keep":
        return site.reason or "no layer that seeds can replace has it as its weight"
    if given != site.shape:
        return f"the model's layer is {site.shape[0]}x{site.shape[1]}, this is another shape"
    if matches(module, exclude) or matches(name, exclude):
        return "excluded"
    if include and not (matches(module, include) or matches(name, include)):
        return "not included"
    return ""
