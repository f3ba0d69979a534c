"""Configurations from TOML files: every name and value is checked before anything runs."""

import dataclasses
import difflib
import math
import os
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from rbe.errors import RbeError
from rbe.formats.outer128 import BLOCKS
from rbe.formats.packed128 import MODES
from rbe.nn.rest import BITS
from rbe.optim.motion import METHODS
from rbe.train.config import PARTS, Config, Layer, Recipe, Seeds

T = TypeVar("T")

# Networks by task.
NETWORKS = {
    "images": ("mlp", "lenet5", "resnet20"),
    "characters": ("lstm",),
    "translation": ("transformer",),
    "language": ("gpt",),
}
# Far more of them end the process.
MOST_THREADS = 1024
# Sizes and rates beyond these are slips of the keyboard, and end in overflows far from here.
MOST_UNITS, HIGHEST = 1 << 24, 1e3
FORMATS = ("outer128", "packed128", "packed64", "stream", "dense")


def load_config(path: str | Path) -> Config:
    """Read a configuration.

    >>> import tempfile
    >>> text = "[data]\\npath = 'mnist.npz'\\n[seeds]\\nblock = 32\\n"
    >>> text += "[[seeds.layer]]\\npattern = 'linear3'\\nblock = 16\\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "small.toml").write_text(text)
    ...     config = load_config(Path(folder) / "small.toml")
    >>> config.name, config.model.widths, config.seeds.of("linear1", 0).block, config.seeds.of("linear3", 2).block
    ('small', (784, 256, 128, 10), 32, 16)

    Raises:
        RbeError: the file cannot be read, is no TOML, or has a name or value that means nothing.
    """
    path = Path(path)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise RbeError(f"train: {path} cannot be read ({cause.strerror or cause}); give a TOML file") from cause
    except (ValueError, RecursionError) as cause:  # numbers of thousands of digits, too
        raise RbeError(f"train: {path} is no TOML: {cause}") from cause
    _refuse_unknown(path, "", given, {"name", *PARTS})
    if not isinstance(given.get("data", {}), dict) or "path" not in given.get("data", {}):
        raise RbeError(f"train: {path} has no [data] path; name the file or folder of the data")
    made: dict[str, Any] = {key: _read(path, key, given.get(key, {}), kind) for key, kind in PARTS.items()}
    name = given.get("name", path.stem)
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise RbeError(f"train: {path}: name is {name!r}; it must be text that can be the name of a folder")
    config = Config(name, folder=path.parent, **made)
    _check(path, config)
    return config


def find(config: Config, name: str) -> Path:
    """A file or folder: as given, below the configuration's folder, or below RBE_DATA.

    Raises:
        RbeError: it is in none of these places.
    """
    places = [config.folder / name]
    if "RBE_DATA" in os.environ:
        places.append(Path(os.environ["RBE_DATA"]) / name)
    for place in places:
        if place.exists():
            return place
    tried = ", ".join(map(str, places))
    raise RbeError(
        f"train: there is no data file {name} (tried {tried}); put it there, give a full path, or set RBE_DATA to the "
        "folder that holds it"
    )


def _refuse_unknown(path: Path, section: str, given: dict[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise RbeError(f"train: {path}: {section}{name} is not known; {hint}")


def _read(path: Path, section: str, given: Any, kind: type[T]) -> T:
    if not isinstance(given, dict):
        raise RbeError(f"train: {path}: [{section}] must be a table")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(path, f"[{section}] ", given, set(fields))
    values: dict[str, Any] = {}
    for name, value in given.items():
        if kind is Seeds and name == "layer":
            values[name] = _layers(path, value)
            continue
        if isinstance(value, list):
            value = tuple(value)
        values[name] = _typed(f"train: {path}: [{section}] {name}", value, _annotation(fields[name].type))
    return kind(**values)


def _layers(path: Path, given: Any) -> tuple[Layer, ...]:
    if not isinstance(given, list):
        raise RbeError(f"train: {path}: write [[seeds.layer]] with two brackets, once for every pattern")
    for one in given:
        if not isinstance(one, dict) or "pattern" not in one:
            raise RbeError(f"train: {path}: a [[seeds.layer]] has no pattern; name the matrices it is for, such as '*'")
    return tuple(_read(path, "seeds.layer", one, Layer) for one in given)


def _annotation(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (),
}


def _typed(what: str, value: Any, annotation: str) -> Any:
    """The value, if it has a type of the annotation; a whole number may stand for any number."""
    if annotation.startswith("tuple"):
        whole = isinstance(value, tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if whole and all(abs(v) < 1 << 63 for v in value):
            return value
        raise RbeError(f"{what} is {value!r}; it must be a list of whole numbers")
    names = [part.strip() for part in annotation.split("|")]
    allowed = tuple(t for name in names for t in _TYPES[name])
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise RbeError(f"{what} is {value!r}; it must be {' or '.join(n for n in names if n != 'None')}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise RbeError(f"{what} is {value}; it must be a number of at most 63 bits")
    return float(value) if "float" in names and isinstance(value, int) else value


def _check(path: Path, config: Config) -> None:
    model, data, seeds = config.model, config.data, config.seeds
    if data.task not in NETWORKS:
        raise RbeError(f"train: {path}: [data] task is {data.task!r}; choose one of {', '.join(NETWORKS)}")
    choices: list[tuple[str, str, tuple[str, ...]]] = [
        ("[model] kind", model.kind, NETWORKS[data.task]),
        ("[model] norm", model.norm, ("batch", "none")),
        ("[train] dtype", config.train.dtype, ("float32", "bfloat16")),
        ("[seeds] format", seeds.format, FORMATS),
        ("[train] phases", config.train.phases, ("one", "three", "rounds")),
        ("[train] method", config.train.method, tuple(METHODS)),
    ]
    choices += [("[[seeds.layer]] format", layer.format, FORMATS) for layer in seeds.layer if layer.format is not None]
    if isinstance(seeds.bias, str) and seeds.bias != "seed":
        raise RbeError(f"train: {path}: [seeds] bias is {seeds.bias!r}; give true, false or 'seed'")
    for what, value, known in choices:
        if value not in known:
            raise RbeError(f"train: {path}: {what} is {value!r}; choose one of {', '.join(known)}")
    edges = [("[seeds]", seeds.format, edge) for edge in (seeds.block, *seeds.blocks)]
    given = 0 if seeds.blocks else seeds.block
    edges += [("[[seeds.layer]]", layer.format or seeds.format, layer.block or given) for layer in seeds.layer]
    for where, kind, edge in edges:
        if kind == "outer128" and edge and edge not in BLOCKS:
            raise RbeError(f"train: {path}: {where} block is {edge}; outer128 has {', '.join(map(str, BLOCKS))}")
    _check_numbers(path, config)
    _check_bits(path, config)
    rest = config.train.rest_bits
    if rest not in BITS or (rest < 32 and {seeds.format, *(one.format or "dense" for one in seeds.layer)} == {"dense"}):
        offered = ", ".join(map(str, BITS))
        raise RbeError(
            f"train: {path}: [train] rest_bits is {rest}; choose one of {offered}, and 32 for a dense network"
        )
    if model.kind == "mlp" and len(model.widths) < 2:
        raise RbeError(f"train: {path}: [model] widths {list(model.widths)} are no network; give input and output")
    if model.kind == "lenet5" and len(model.widths) != 4:
        raise RbeError(f"train: {path}: [model] widths of lenet5 are two numbers of filters, units and classes")
    if model.kind in ("transformer", "gpt") and model.size % model.heads:
        raise RbeError(f"train: {path}: [model] heads {model.heads} do not divide size {model.size}")
    if data.task != "images" and model.vocabulary < 1:
        raise RbeError(f"train: {path}: [model] vocabulary is missing; it is the number of symbols of {data.task}")
    if data.task == "language" and data.tokenizer is None:
        raise RbeError(f"train: {path}: [data] tokenizer is missing; name a folder with a tokenizer.json")
    if data.task != "images" and seeds.blocks:
        raise RbeError(f"train: {path}: [seeds] blocks is for networks of images; use [[seeds.layer]] patterns")
    if config.train.sequence_level and (data.task != "translation" or config.train.teacher is None):
        raise RbeError(f"train: {path}: [train] sequence_level is for translation with a teacher; leave it out")
    if config.train.batch == 1 and data.task == "images" and (model.kind == "resnet20" or model.norm == "batch"):
        raise RbeError(f"train: {path}: [train] batch is 1, of which batch norms learn nothing; give 2 or more")
    used = {seeds.format, *(layer.format for layer in seeds.layer if layer.format)}
    if seeds.mode is not None and (seeds.mode not in MODES or "packed128" not in used):
        raise RbeError(
            f"train: {path}: [seeds] mode is {seeds.mode!r}; packed128 has {' and '.join(MODES)}, others have none"
        )
    if seeds.bias == "seed" and (used - {"packed64", "packed128", "dense"} or used == {"dense"}):
        raise RbeError(
            f"train: {path}: [seeds] bias is 'seed', which {', '.join(sorted(used))} cannot be; give true or false, "
            "or packed64 or packed128 for all matrices"
        )
    if seeds.rows and seeds.format != "stream":
        raise RbeError(f"train: {path}: [seeds] rows is for format stream; leave it out")
    matrices = {"lenet5": 4, "mlp": len(model.widths) - 1}.get(model.kind, 0)
    if seeds.blocks and len(seeds.blocks) != matrices:
        raise RbeError(f"train: {path}: [seeds] blocks has {len(seeds.blocks)} entries for {matrices} matrices")
    own = [layer for layer in seeds.layer if layer.bytes is not None]
    if any((layer.format or seeds.format) != "stream" or layer.bytes < 1 for layer in own if layer.bytes is not None):
        raise RbeError(f"train: {path}: [[seeds.layer]] bytes is a positive number for matrices of format stream")
    if seeds.streamed:
        _check_stream(path, config, matrices)
    elif seeds.bytes and (seeds.format != "outer128" or seeds.blocks):
        raise RbeError(f"train: {path}: [seeds] bytes chooses blocks of outer128; leave blocks and other formats out")


def _check_stream(path: Path, config: Config, matrices: int) -> None:
    seeds, recipe, plain = config.seeds, config.train, Recipe()
    others = {seeds.format, *(layer.format for layer in seeds.layer if layer.format)} - {"stream", "dense"}
    if others:
        raise RbeError(
            f"train: {path}: [seeds] format {', '.join(sorted(others))} cannot stand beside stream in one network; "
            "what is no stream must be dense"
        )
    if not seeds.bytes and not any(layer.bytes for layer in seeds.layer):
        raise RbeError(f"train: {path}: [seeds] bytes is missing; with format stream it says how many there may be")
    if seeds.rows and (len(seeds.rows) != matrices or min(seeds.rows) < 1 or seeds.layer):
        raise RbeError(
            f"train: {path}: [seeds] rows is {list(seeds.rows)}; give {matrices} positive numbers"
            if matrices
            else f"train: {path}: [seeds] rows is for a mlp or lenet5, all of whose matrices are streams; leave it out"
        )
    of_points = ("flip_every", "beam_every", "phases", "method", "weight_decay", "pull", "clip_norm")
    wrong = [name for name in of_points if getattr(recipe, name) != getattr(plain, name)]
    if wrong:
        raise RbeError(f"train: {path}: [train] {', '.join(wrong)} have no meaning with stream; leave them out")


def _check_bits(path: Path, config: Config) -> None:
    """Refuse what only formats with discrete bits can do."""
    recipe, formats = config.train, {config.seeds.format, *(layer.format for layer in config.seeds.layer)}
    wanted = {
        "flip_every": (bool(recipe.flip_every), {"outer128", "packed128"}),
        "beam_every": (bool(recipe.beam_every), {"packed128"}),
        'phases = "three"': (recipe.phases == "three", {"outer128", "packed128"}),
        'phases = "rounds"': (recipe.phases == "rounds", {"outer128"}),
    }
    for name, (asked, able) in wanted.items():
        if asked and not able & formats and "stream" not in formats:
            raise RbeError(
                f"train: {path}: [train] {name} changes discrete bits, which {' and '.join(sorted(able))} have; leave "
                "it out, or choose such a [seeds] format"
            )


def _check_numbers(path: Path, config: Config) -> None:
    recipe, model, held = config.train, config.model, config.data.validation
    positive: dict[str, float] = {"batch": recipe.batch, "flip_temperature": recipe.flip_temperature}
    if recipe.epochs or model.start is None:
        positive["epochs"] = recipe.epochs
    sections = [("train", name, number, number > 0, "positive") for name, number in positive.items()]
    positive |= {"flip_temperature": recipe.flip_temperature}
    whole: dict[str, float] = {"steps": recipe.steps, "clip": recipe.clip, "patience": recipe.patience}
    whole |= {"flip_every": recipe.flip_every, "beam_every": recipe.beam_every}
    sections += [("train", name, number, number >= 0, "0 or more") for name, number in whole.items()]
    shares = {"smoothing": recipe.smoothing, "weight": recipe.weight}
    shares |= {"flip_share": recipe.flip_share, "beam_share": recipe.beam_share}
    sections += [("train", name, number, 0 <= number <= 1, "in [0, 1]") for name, number in shares.items()]
    sizes = {"width": model.width, "layers": model.layers, "size": model.size, "heads": model.heads}
    sizes |= {"inner": model.inner, **{f"widths, entry {k + 1},": width for k, width in enumerate(model.widths)}}
    most = "positive, and below 2^24"
    sections += [("model", name, number, 0 < number < MOST_UNITS, most) for name, number in sizes.items()]
    sections.append(("train", "lr", recipe.lr, 0 < recipe.lr <= HIGHEST, f"positive, and at most {HIGHEST:g}"))
    # Signs, or all that is dense, may stay where they are; streams have no signs to hold.
    least = math.ulp(0.0) if config.seeds.streamed else 0.0
    most = f"{'positive' if least else '0 or more'}, and at most {HIGHEST:g}"
    sections += [
        (
            "train",
            name,
            rate,
            least <= rate <= HIGHEST,
            f"{'positive' if least else '0 or more'}, and at most {HIGHEST:g}",
        )
        for name, rate in {"latent_lr": recipe.latent_lr, "dense_lr": recipe.dense_lr}.items()
        if rate is not None
    ]
    sections += [
        ("model", "dropout", model.dropout, 0 <= model.dropout < 1, "in [0, 1)"),
        ("data", "length", config.data.length, config.data.length > 1, "at least 2"),
        ("data", "validation", held, held > 0 or config.data.task == "characters", "positive"),
        ("data", "shrink", config.data.shrink, config.data.shrink > 0, "positive"),
        ("data", "shift", config.data.shift, 0 <= config.data.shift < MOST_UNITS, "0 or more, and below 2^24"),
        ("model", "vocabulary", model.vocabulary, 0 <= model.vocabulary < MOST_UNITS, "0 or more, and below 2^24"),
        ("seeds", "bytes", config.seeds.bytes, config.seeds.bytes >= 0, "0 or more"),
        ("seeds", "spread", config.seeds.spread, 0 < config.seeds.spread < math.inf, "positive"),
        ("train", "softness", recipe.softness, 0 < recipe.softness < math.inf, "positive"),
        ("train", "threads", recipe.threads, 0 <= recipe.threads <= MOST_THREADS, f"at most {MOST_THREADS}"),
    ]
    for section, name, number, fine, wanted in sections:
        if not fine:
            raise RbeError(f"train: {path}: [{section}] {name} is {number}; it must be {wanted}")
