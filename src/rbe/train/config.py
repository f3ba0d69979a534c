"""What a training run is: a frozen value, made of a section for each of its parts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Data:
    """What is learned from; relative paths are looked up below the configuration's folder and below RBE_DATA.

    Attributes:
        path: images: an .npz file with x_train, y_train, x_test, y_test, uint8 images (n, h, w[, channels]), or with
            data, offsets, labels, joined JPEG streams of which the last sixth is the test set. characters: a text file.
            translation: a folder with {train,val,test_2016_flickr}.{de,en}.txt. language: a folder with {train,valid,
            test}.txt.
        task: "images", "characters", "translation" or "language".
        validation: images: the last of the training set, on which a run is stopped and chosen; never trained on.
        shrink: images: squares of so many pixels become one, their mean. For a first run that a longer one starts from.
        shift: training images are moved by up to this many pixels, every batch anew; flip: half of them are mirrored.
        length: characters, language: symbols of a window; translation: most subwords of a sentence that is trained on.
        tokenizer: language: a folder with the tokenizer.json to use.
    """

    path: str
    task: str = "images"
    validation: int = 5000
    shrink: int = 1
    shift: int = 0
    flip: bool = False
    length: int = 128
    tokenizer: str | None = None


@dataclass(frozen=True)
class Model:
    """A network.

    Attributes:
        kind: "mlp", "lenet5" or "resnet20" for images, "lstm" for characters, "transformer" for translation, "gpt" for
            language.
        widths: of a mlp's layers, input and output included; of LeNet-5 (filters, filters, units, classes).
        norm: "batch" or "none", after every layer of a mlp or LeNet-5 but the last.
        width: resnet20: how many times as wide as the published one.
        vocabulary: number of symbols.
        layers: of lstm and gpt; of the encoder, and as many of the decoder, of a transformer.
        size: units of a lstm, features of a transformer; heads: of its attention; inner: of its feed-forward network.
        dropout: of embeddings and of what layers return.
        start: folder of a run of a dense network of the same shape, for gpt also of a GPT-2 model of transformers:
            dense tensors and streams begin with its weights, other seeds do not.
    """

    kind: str = "mlp"
    widths: tuple[int, ...] = (784, 256, 128, 10)
    norm: str = "batch"
    width: int = 1
    vocabulary: int = 0
    layers: int = 2
    size: int = 256
    heads: int = 4
    inner: int = 1024
    dropout: float = 0.0
    start: str | None = None


@dataclass(frozen=True)
class Layer:
    """What the matrices of some names are made of; what is left out is as for all.

    Attributes:
        pattern: shell pattern of a matrix's name, as in the plan that a run prints; the last that matches decides.
        format: "dense", or as in `Seeds`.
        block, stages: as in `Seeds`.
        bytes: stream: of the seeds of these matrices together, apart from those that `Seeds.bytes` is for.
    """

    pattern: str
    format: str | None = None
    block: int | None = None
    stages: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Seeds:
    """What the weight matrices are made of.

    Attributes:
        format: "outer128", "packed128", "packed64", "stream", or "dense" for the reference.
        block, mode, stages: as in `rbe.formats.make_spec`; a mode is for the matrices of packed128.
        blocks: a block edge for each matrix in turn, in place of `block`.
        bias: True (dense), False or "seed".
        layer: exceptions by name.
        bytes: seeds of all matrices together; block edges are then chosen by measured sensitivity. 0: as given. For
            stream they must be given, and training keeps to them; matrices of a pattern with bytes of its own do not
            count.
        rows: stream, mlp and lenet5: rows of each matrix in turn that may have weights; the others are 0 from the
            start, and cost no time. Empty: all.
        spread: stream: scale at the start, see `rbe.nn.StreamLinear`.
    """

    format: str = "outer128"
    block: int = 16
    mode: str | None = None
    stages: int = 1
    blocks: tuple[int, ...] = ()
    bias: bool | str = True
    layer: tuple[Layer, ...] = ()
    bytes: int = 0
    rows: tuple[int, ...] = ()
    spread: float = 2.0

    def of(self, name: str, number: int) -> "Seeds":
        """What a matrix is made of, by its name and its place among all."""
        mine = replace(self, block=self.blocks[number]) if self.blocks else self
        for layer in self.layer:
            if fnmatchcase(name, layer.pattern):
                given = {k: v for k, v in dataclasses.asdict(layer).items() if k != "pattern" and v is not None}
                mine = replace(mine, **given)
        # Of a mode there is one for all, which packed128 alone has.
        return mine if mine.format == "packed128" else replace(mine, mode=None)

    @property
    def streamed(self) -> bool:
        """Whether some matrix is a stream; the others are dense then."""
        return "stream" in (self.format, *(layer.format for layer in self.layer))

    def budget(self, name: str) -> tuple[str, int]:
        """(pattern, bytes) of the streams that a stream shares its bytes with; no pattern stands for `bytes`."""
        own = [(one.pattern, one.bytes) for one in self.layer if one.bytes and fnmatchcase(name, one.pattern)]
        return ("", self.bytes) if not own else own[-1]

    def planned(self, blocks: Mapping[str, int]) -> "Seeds":
        """The same with a block edge for each of these matrices."""
        return replace(self, layer=(*self.layer, *(Layer(name, block=edge) for name, edge in blocks.items())))


@dataclass(frozen=True)
class Recipe:
    """How it is trained.

    Attributes:
        epochs: passes over the training set; 0 measures a network that has a [model] start.
        batch: images, windows or sentences a step.
        steps: of an epoch, where it should be less than a pass; 0 is a whole pass.
        lr: highest learning rate of points and dense parameters; one cycle up and down to 0.
        latent_lr, dense_lr: highest learning rates of latents, and of dense parameters; lr when left out, but for
            dense parameters beside streams, which then have a tenth of the rate of latents.
        method: how points move, see `rbe.optim.HybridAdam`.
        weight_decay, pull, clip_norm: as in `HybridAdam`.
        clip: longest gradient of all parameters together, 0 for any length.
        smoothing: share of the target that is spread over all classes.
        flip_every: steps between state transitions; 0 is none. The last quarter of the run has none.
        flip_share, flip_temperature: at the beginning; both fall as the paper has it.
        beam_every, beam_share: the same for beam searches over the fields of packed128, see `HybridAdam.beam`.
        phases: "one"; "three": points alone, then everything, then points with every bit at rest, see
            `rbe.optim.three_phases`; "rounds": outer128, in the second half ever more signs are held and the rest makes
            up for it, see `rbe.optim.rounds`.
        teacher: folder of a dense run whose outputs are learned too; relative to the configuration. For language also
            the folder of a GPT-2 model of transformers, of any size.
        sequence_level: translation: the teacher's own translations are the targets, in place of the given ones.
        softness, weight: temperature and share of the teacher's outputs in the loss.
        rest_bits: 16 or 8 fold batch norms into the layers and store what is left beside the seeds so, see
            `rbe.nn.pack`; 32 leaves it as it is.
        patience: epochs without a better validation metric after which a run ends; 0 never.
        dtype: "float32", or "bfloat16" for products while training (autocast): twice as fast on processors that have
            instructions for it. Parameters stay float32, seeds in blocks are multiplied in it, and validation and test
            are measured in it.
        seed, threads: of random numbers; of torch, 0 being its own choice.
    """

    epochs: int = 40
    batch: int = 256
    steps: int = 0
    lr: float = 1e-2
    latent_lr: float | None = None
    dense_lr: float | None = None
    method: str = "tangent"
    weight_decay: float = 0.0
    pull: float = 0.0
    clip_norm: float | None = None
    clip: float = 0.0
    smoothing: float = 0.0
    flip_every: int = 0
    flip_share: float = 0.05
    flip_temperature: float = 0.1
    beam_every: int = 0
    beam_share: float = 0.05
    phases: str = "one"
    teacher: str | None = None
    sequence_level: bool = False
    softness: float = 4.0
    weight: float = 0.9
    rest_bits: int = 32
    patience: int = 0
    dtype: str = "float32"
    seed: int = 0
    threads: int = 0


@dataclass(frozen=True)
class Config:
    """A training run.

    >>> config = Config("quick", Data("mnist/mnist.npz"), train=Recipe(epochs=3))
    >>> config.model.widths, config.seeds.format, config.train.epochs
    ((784, 256, 128, 10), 'outer128', 3)
    >>> Config.from_json(config.to_json()) == config
    True

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
        about = {k: v for k, v in dataclasses.asdict(self).items() if k != "folder"}
        # Runs of before there was a choice go on.
        if self.train.dtype == "float32":
            del about["train"]["dtype"]
        if not self.train.sequence_level:
            del about["train"]["sequence_level"]
        if self.data.shrink == 1:
            del about["data"]["shrink"]
        return about

    @classmethod
    def from_json(cls, about: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        made: dict[str, Any] = {}
        for key, kind in PARTS.items():
            part = {k: tuple(v) if isinstance(v, list) else v for k, v in about[key].items()}
            if key == "seeds":
                part["layer"] = tuple(Layer(**layer) for layer in part.get("layer", ()))
            made[key] = kind(**part)
        return cls(about["name"], **made)


PARTS: dict[str, Any] = {"data": Data, "model": Model, "seeds": Seeds, "train": Recipe}
