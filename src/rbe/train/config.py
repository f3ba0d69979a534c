"""What a training run is: a frozen value, read from a TOML file."""

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from rbe.errors import RbeError
from rbe.nn.rest import BITS

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Images with labels.

    Attributes:
        path: an .npz file with x_train, y_train, x_test, y_test, uint8 images (n, h, w[, channels]); relative paths are
            looked up below the configuration's folder and below RBE_DATA.
        validation: the last images of the training set, on which a run is stopped and chosen; never trained on.
        shift: training images are moved by up to this many pixels, every batch anew.
    """

    path: str
    validation: int = 5000
    shift: int = 0


@dataclass(frozen=True)
class Model:
    """A network.

    Attributes:
        kind: "mlp" or "lenet5".
        widths: of a mlp's layers, input and output included; of LeNet-5 (filters, filters, units, classes).
        norm: "batch" or "none", after every layer but the last.
    """

    kind: str = "mlp"
    widths: tuple[int, ...] = (784, 256, 128, 10)
    norm: str = "batch"


@dataclass(frozen=True)
class Seeds:
    """What the weight matrices are made of.

    Attributes:
        format: "outer128", "packed128", "packed64", or "dense" for the reference.
        block, mode, stages: as in `rbe.formats.make_spec`.
        blocks: a block edge for each matrix in turn, in place of `block`.
        bias: True (dense), False or "seed".
    """

    format: str = "outer128"
    block: int = 16
    mode: str | None = None
    stages: int = 1
    blocks: tuple[int, ...] = ()
    bias: bool | str = True


@dataclass(frozen=True)
class Recipe:
    """How it is trained.

    Attributes:
        epochs, batch: passes over the training set, images a step.
        lr: highest learning rate of points and dense parameters; one cycle up and down to 0.
        latent_lr: highest learning rate of latents; lr when left out.
        method: how points move, see `rbe.optim.HybridAdam`.
        weight_decay, pull, clip_norm: as in `HybridAdam`.
        flip_every: steps between state transitions; 0 is none. The last quarter of the run has none.
        flip_share, flip_temperature: at the beginning; both fall as the paper has it.
        teacher: folder of a dense run whose outputs are learned too; relative to the configuration.
        softness, weight: temperature and share of the teacher's outputs in the loss.
        rest_bits: 16 or 8 fold batch norms into the layers and store what is left beside the seeds so, see
            `rbe.nn.pack`; 32 leaves it as it is.
        patience: epochs without a better validation accuracy after which a run ends; 0 never.
        seed, threads: of random numbers; of torch, 0 being its own choice.
    """

    epochs: int = 40
    batch: int = 256
    lr: float = 1e-2
    latent_lr: float | None = None
    method: str = "tangent"
    weight_decay: float = 0.0
    pull: float = 0.0
    clip_norm: float | None = None
    flip_every: int = 0
    flip_share: float = 0.05
    flip_temperature: float = 0.1
    teacher: str | None = None
    softness: float = 4.0
    weight: float = 0.9
    rest_bits: int = 32
    patience: int = 0
    seed: int = 0
    threads: int = 0


@dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
        name: of the run.
        data, model, seeds, train: its parts.
        folder: of the file it was read from.
    """

    name: str
    data: Data
    model: Model = field(default_factory=Model)
    seeds: Seeds = field(default_factory=Seeds)
    train: Recipe = field(default_factory=Recipe)
    folder: Path = Path()

    def to_json(self) -> dict[str, Any]:
        """Everything that decides about the result, JSON-ready."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "folder"}

    @classmethod
    def from_json(cls, about: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        made: dict[str, Any] = {}
        for key, kind in _PARTS.items():
            made[key] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in about[key].items()})
        return cls(about["name"], **made)


_PARTS: dict[str, Any] = {"data": Data, "model": Model, "seeds": Seeds, "train": Recipe}


def load_config(path: str | Path) -> Config:
    """Read a configuration.

    >>> import tempfile
    >>> text = "[data]\\npath = 'mnist.npz'\\n[seeds]\\nblock = 32\\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "small.toml").write_text(text)
    ...     config = load_config(Path(folder) / "small.toml")
    >>> config.name, config.seeds.block, config.model.widths
    ('small', 32, (784, 256, 128, 10))

    Raises:
        RbeError: the file cannot be read, is no TOML, or has a name or value that means nothing.
    """
    path = Path(path)
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise RbeError(f"train: {path} cannot be read ({cause.strerror or cause}); give a TOML file") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise RbeError(f"train: {path} is no TOML: {cause}") from cause
    _refuse_unknown(path, "", given, {"name", *_PARTS})
    if "path" not in given.get("data", {}):
        raise RbeError(f"train: {path} has no [data] path; name an .npz file with x_train, y_train, x_test and y_test")
    made: dict[str, Any] = {key: _read(path, key, given.get(key, {}), kind) for key, kind in _PARTS.items()}
    config = Config(given.get("name", path.stem), folder=path.parent, **made)
    _check(path, config)
    return config


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
    values = {}
    for name, value in given.items():
        if isinstance(value, list):
            value = tuple(value)
        values[name] = _typed(f"train: {path}: [{section}] {name}", value, _annotation(fields[name].type))
    return kind(**values)


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
        if isinstance(value, tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return value
        raise RbeError(f"{what} is {value!r}; it must be a list of whole numbers")
    names = [part.strip() for part in annotation.split("|")]
    allowed = tuple(t for name in names for t in _TYPES[name])
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise RbeError(f"{what} is {value!r}; it must be {' or '.join(n for n in names if n != 'None')}")
    return float(value) if "float" in names and isinstance(value, int) else value


def _check(path: Path, config: Config) -> None:
    recipe, model = config.train, config.model
    positive = {"epochs": recipe.epochs, "batch": recipe.batch, "softness": recipe.softness}
    for name, number in positive.items():
        if number <= 0:
            raise RbeError(f"train: {path}: [train] {name} is {number}; it must be positive")
    choices: list[tuple[str, str, tuple[str, ...]]] = [
        ("[model] kind", model.kind, ("mlp", "lenet5")),
        ("[model] norm", model.norm, ("batch", "none")),
    ]
    formats = ("outer128", "packed128", "packed64", "dense")
    choices += [("[seeds] format", config.seeds.format, formats)]
    for what, value, known in choices:
        if value not in known:
            raise RbeError(f"train: {path}: {what} is {value!r}; choose one of {', '.join(known)}")
    if recipe.rest_bits not in BITS or (recipe.rest_bits < 32 and config.seeds.format == "dense"):
        raise RbeError(
            f"train: {path}: [train] rest_bits is {recipe.rest_bits}; choose one of {', '.join(map(str, BITS))}, "
            "and 32 for a dense network"
        )
    if model.kind == "mlp" and len(model.widths) < 2:
        raise RbeError(f"train: {path}: [model] widths {list(model.widths)} are no network; give input and output")
    if model.kind == "lenet5" and len(model.widths) != 4:
        raise RbeError(f"train: {path}: [model] widths of lenet5 are two numbers of filters, units and classes")
    matrices = 4 if model.kind == "lenet5" else len(model.widths) - 1
    if config.seeds.blocks and len(config.seeds.blocks) != matrices:
        raise RbeError(f"train: {path}: [seeds] blocks has {len(config.seeds.blocks)} entries for {matrices} matrices")
