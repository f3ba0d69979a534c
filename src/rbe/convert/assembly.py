"""Finished pieces and kept tensors to a compressed folder."""

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rbe import checkpoint
from rbe.allocate import Plan
from rbe.checkpoint import Contents, Module
from rbe.convert.encoding import Progress
from rbe.convert.journal import Journal
from rbe.formats import SeedSpec
from rbe.shards import Outgoing
from rbe.source import Roles, Source, architecture

# Names of the tensors of a module.
KEYS = ("seeds", "scale", "row_scale", "outlier_index", "outlier_values")


def assemble(
    out: Path,
    dense: Source,
    roles: Roles,
    plan: Plan,
    journal: Journal,
    settings: Mapping[str, Any],
    shard_size: int,
    tell: Callable[[Progress], object],
) -> None:
    """Put shards, index, configuration, card and copied files together in the work folder."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tensors: list[Outgoing] = []
    modules: dict[str, Module] = {}
    for entry in plan:
        if entry.spec is None:
            if entry.stored:
                kept = dense.tensors[entry.name]
                tensors.append(Outgoing(kept.name, kept.dtype, kept.shape, kept.chunks))
            continue
        found = journal.tensors(entry.name)
        for key in KEYS:
            if key in found:
                piece = found[key]
                tensors.append(Outgoing(f"{entry.module}.{key}", piece.dtype, piece.shape, piece.chunks))
        tied = tuple(name.removesuffix(".weight") for name, holder in roles.tied.items() if holder == entry.name)
        spec = SeedSpec.from_json(journal.done[entry.name]["spec"])
        sides = entry.shape if len(entry.shape) != 2 else ()
        named = "" if entry.name == f"{entry.module}.weight" else entry.name
        modules[entry.module] = Module(
            spec, entry.kind, entry.row_scale, entry.transposed, entry.dtype, tied, named, sides, entry.outliers
        )
    tell(Progress("write", dense.path.name))
    copied = {}
    for name in dense.others:
        target = name.as_posix()
        copied["README.source.md" if target == checkpoint.CARD else target] = dense.path / name
    about = {"name": dense.name, "bare": dense.bare, "bytes": plan.source_bytes, "metadata": dense.metadata}
    contents = Contents(
        modules=modules,
        config=dense.config or {},
        settings=settings,
        source=about,
        errors={entry.module: journal.done[entry.name]["error"] for entry in plan.seeded},
        copied=copied,
        card=_card(dense, plan),
    )
    checkpoint.write_folder(out, tensors, contents, shard_size)


def _card(dense: Source, plan: Plan) -> str:
    """README.md of the folder: how to load it."""
    if dense.bare:
        load = "from pathlib import Path\nfrom rbe import checkpoint\n\n"
        load += 'matrices, others = checkpoint.load_matrices(Path("this-folder"))\n'
        load += "matrices[name].matmul(x)      # name is that of the tensor, without .weight"
    else:
        name = architecture(dense.config or {}) or "AutoModel"
        load = "import rbe.hf                 # without this line transformers raises a mismatch of sizes\n"
        load += f'from transformers import {name}\n\nmodel = {name}.from_pretrained("this-folder")'
    rates = sorted({entry.format for entry in plan.seeded})
    rates = rates if len(rates) < 4 else ["various rates"]
    share = sum(entry.weights for entry in plan.seeded) / max(1, plan.weights)
    return (
        f"# {dense.name}, stored as seeds\n\n"
        f"{len(plan.seeded)} matrices with {100 * share:.1f} % of the {plan.weights:,} numbers of `{dense.name}` "
        f"are stored as {', '.join(rates)} and generated where they are used. The rest is as it was.\n\n"
        f"```python\n{load}\n```\n\n"
        "`rbe inspect` shows what is inside, `rbe verify` checks that it is intact and that the model answers as it\n"
        "did, `rbe decompress` writes an ordinary dense model again.\n"
    )


def ask(
    out: Path,
    dense: Source,
    fingerprint: Callable[[Path], Mapping[str, Any]] | None,
    remarks: list[str],
    missing: Sequence[str] = (),
) -> Mapping[str, Any] | None:
    """What the model answers to a fixed input, or None with a remark why nothing could ask it.

    Where the source lacks tensors, an answer counts only if loading once more, with other random numbers, repeats it.
    """
    if fingerprint is not None:
        return fingerprint(out)
    if dense.bare or importlib.util.find_spec("transformers") is None:
        return None
    try:
        hf = importlib.import_module("rbe.hf")
        asked: Mapping[str, Any] = hf.fingerprint(out)
        if missing and hf.fingerprint(out) != asked:
            remarks.append("no fingerprint of the outputs was stored: they hang on what the source lacks")
            return None
        return asked
    except Exception as cause:  # hours of encoding must not be lost because the model wants images, or newer code
        first = str(cause).strip().partition("\n")[0]
        remarks.append(f"no fingerprint of the outputs was stored: the model could not be asked ({first})")
        return None
