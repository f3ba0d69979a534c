"""The commands. Heavy modules are imported inside them: `rbe --help` must answer at once."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rbe.errors import RbeError

app = typer.Typer(
    name="rbe",
    help="Store the weights of neural networks as seeds, 0.5 to 4 bits a weight, and run them from there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: rbe compress MODEL_FOLDER NEW_FOLDER --bits 2",
)


class Effort(StrEnum):
    """How hard the encoder searches."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class Format(StrEnum):
    """What seeds are."""

    trellis = "trellis"
    packed64 = "packed64"
    packed128 = "packed128"
    outer128 = "outer128"


class Mode(StrEnum):
    """Variant of packed128."""

    radial = "radial"
    faithful = "faithful"


class Activations(StrEnum):
    """How activations enter the product."""

    float32 = "float32"
    int8 = "int8"


Folder = Annotated[Path, typer.Argument(metavar="DST", help="A compressed folder, written by `rbe compress`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Against = Annotated[Path, typer.Option("--against", metavar="SRC", help="The dense model it was made from.")]
MaybeAgainst = Annotated[
    Path | None, typer.Option("--against", metavar="SRC", help="Also compare with the dense model it was made from.")
]
Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help="Text to compare on (default: built in).")]
Limit = Annotated[int | None, typer.Option(min=2, help="Use at most so many texts or tokens.")]
Act = Annotated[Activations, typer.Option(help="float32 is exact; int8 is faster and rounds the activations.")]

NO_MEMORY = "out of memory; free some, or ask for less"
RESUMES = "interrupted; what is done is kept, run the same command again and it goes on from there"
GOES_ON = "interrupted; run it again without --restart and it goes on from its last checkpoint, if it had one"


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what can go wrong for a user into a message and an exit code; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            command(*args, **options)
        except RbeError as wrong:
            # A failed `verify` has printed its JSON object already, with the problems one by one.
            fail(str(wrong), as_json and not getattr(wrong, "said", False))
        except KeyboardInterrupt:
            fail({"compress": RESUMES, "train": GOES_ON}.get(command.__name__, "interrupted"), as_json, 130)
        except ImportError as missing:
            extra = _EXTRAS.get((missing.name or "").split(".")[0])
            if extra is None:
                raise
            fail(f"this command needs {missing.name}; install it with: pip install 'rbe[{extra}]'", as_json)
        except BrokenPipeError:
            # The reader of our output has gone (`rbe inspect | head`); Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as wrong:
            fail(f"{wrong.strerror or wrong}{f': {wrong.filename}' if wrong.filename else ''}", as_json)
        except MemoryError:
            fail(NO_MEMORY, as_json)
        except RuntimeError as wrong:
            if "can't allocate memory" not in str(wrong):  # what torch says of it
                raise
            fail(NO_MEMORY, as_json)

    return run


_EXTRAS = {"transformers": "hf", "tokenizers": "hf", "accelerate": "hf", "matplotlib": "report", "joblib": "convert"}


def fail(message: str, as_json: bool, code: int = 1) -> NoReturn:
    """Say what is wrong on standard error (and as JSON on standard output) and end with a code that is not 0."""
    if as_json:
        from rbe.cli import show

        show.machine({"error": message})
    print(f"rbe: {message}", file=sys.stderr)
    raise typer.Exit(code)


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Store the weights of neural networks as seeds, 0.5 to 4 bits a weight, and run them from there."""
    if show_version:
        from importlib import metadata

        print(metadata.version("rbe"))
        raise typer.Exit


def _rates(given: Sequence[str]) -> dict[str, Any]:
    """The rates of `--rate PATTERN=BITS`, or `PATTERN=ROW:BITS,...,BITS` for a table.

    Raises:
        RbeError: one is not written so.
    """
    found = {}
    for text in given:
        pattern, _, bits = text.rpartition("=")
        try:
            found[pattern] = float(bits) if ":" not in bits else tuple(_grade(grade) for grade in bits.split(","))
        except ValueError:
            pattern = ""
        if not pattern:
            raise RbeError(
                f"--rate {text}: write PATTERN=BITS, for instance '*.attention.*=3', or, for embeddings, the bits up "
                "to certain rows and those of the rest, '*word_embeddings=2048:3,8192:1.5,1'"
            )
    return found


def _grade(text: str) -> tuple[int | None, float]:
    """(end row, bits); no row is the last one."""
    end, _, bits = text.rpartition(":")
    return int(end) if end else None, float(bits)


def _block(text: str) -> int | None:
    """The value of `--block`.

    Raises:
        RbeError: it is neither a number nor "none".
    """
    if text.lower() == "none":
        return None
    if not text.isdecimal():
        raise RbeError(f"--block {text}: give the edge of a block, such as 16, or none for one block a matrix")
    return int(text)


@app.command()
@guarded
def compress(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A model folder, or a .safetensors file.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write; an older result there is replaced.")
    ],
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight of a trellis: 0.5, 1, 1.5, 2 (default), 2.5, 3, 3.5 or 4; any mean with --allocate."
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="What the seeds are.")] = Format.trellis,
    block: Annotated[
        str, typer.Option(metavar="EDGE|none", help="Packed formats: edge of a block; none makes a matrix one block.")
    ] = "16",
    mode: Annotated[Mode | None, typer.Option(help="packed128: radial (default), or faithful to the paper.")] = None,
    stages: Annotated[int, typer.Option(min=1, help="Packed formats: seeds summed in every block.")] = 1,
    outliers: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Keep the largest weights beside the seeds, e.g. 0.005 of them (default: extreme ones; 0: none).",
        ),
    ] = None,
    precision: Annotated[int, typer.Option(help="packed64: bits of a number, 32 or 64.")] = 32,
    effort: Annotated[Effort, typer.Option(help="How hard to search: fast for a try, best for the last percents.")] = (
        Effort.balanced
    ),
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Compress only matching modules, e.g. '*.attn.*'.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave matching modules as they are.")
    ] = None,
    embeddings_bits: Annotated[
        float | None, typer.Option(help="Bits a weight of the embeddings; 0 leaves them (default: as --bits).")
    ] = None,
    rates: Annotated[
        list[str] | None,
        typer.Option(
            "--rate",
            metavar="PATTERN=BITS",
            help="Another rate for matching modules, e.g. '*.attn.*=3'; for a table "
            "up to certain rows, '*wte=2048:3,1'.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="random|FILE", help="Run the dense model first, on random tokens or a text."),
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            metavar="random|FILE",
            help="Spread the bits, --bits on average: more where the answers of the dense model, to random tokens "
            "or to a text, hang on it.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the search (default: all cores).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the rotations; the same gives the same bytes.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 500MB or 5GB.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model. Interrupted, it goes on where it stopped; DST appears only when it is complete."""
    from rbe.cli import work

    work.compress(
        source,
        target,
        as_json,
        dry_run,
        bits=bits,
        effort=effort.value,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        embeddings_bits=embeddings_bits,
        rates=_rates(rates or ()),
        threads=threads,
        seed=seed,
        max_shard_size=max_shard_size,
        format=format.value,
        block=_block(block),
        mode=None if mode is None else mode.value,
        stages=stages,
        precision=precision,
        outliers=outliers,
        calibrate=calibrate,
        allocate=allocate,
    )


@app.command()
@guarded
def inspect(
    folder: Folder,
    everything: Annotated[bool, typer.Option("--all", help="List the tensors that were left as they are too.")] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="SRC", help="Also compare the singular values with the source's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a folder holds: every tensor with its rate, bytes, error and the Shannon floor; totals."""
    from rbe.cli import work

    work.inspect(folder, everything, as_json, against)


@app.command()
@guarded
def verify(
    folder: Folder,
    source: Annotated[Path | None, typer.Argument(metavar="[SRC]", help="The source, to check the errors too.")] = None,
    as_json: Json = False,
) -> None:
    """Check a folder: checksums, shapes, the model's answer to a fixed input. Exit code 0 means sound."""
    from rbe.cli import work

    work.verify(folder, source, as_json)


@app.command(name="eval")
@guarded
def evaluate(
    folder: Folder,
    against: Against,
    text: Text = None,
    limit: Limit = None,
    activations: Act = Activations.float32,
    as_json: Json = False,
) -> None:
    """Compare a compressed model with its source: outputs (cosine, KL, perplexity), speed and memory of both."""
    from rbe.cli import work

    work.evaluate(folder, against, text, limit, activations.value, as_json)


@app.command()
@guarded
def decompress(
    folder: Folder,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")],
    as_json: Json = False,
) -> None:
    """Write an ordinary dense model folder from a compressed one."""
    from rbe.cli import work

    work.decompress(folder, target, as_json)


@app.command()
@guarded
def report(
    folder: Folder,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page to write (default: DST-report.html)."),
    ] = None,
    against: MaybeAgainst = None,
    text: Text = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a compressed model."""
    from rbe.cli import work

    work.report(folder, output, against, text, limit, as_json)


@app.command()
@guarded
def profile(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="A model folder, compressed or dense.")],
    activations: Act = Activations.float32,
    as_json: Json = False,
) -> None:
    """Measure what a model costs: bytes, speed, peak memory, multiply-adds."""
    from rbe.cli import work

    work.profile(folder, activations.value, as_json)


@app.command()
@guarded
def generate(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="A language model folder, compressed or dense.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many likeliest tokens; 0 is all.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    activations: Act = Activations.float32,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a language model, streaming the text."""
    from rbe.cli import write

    write.generate(folder, prompt, max_new_tokens, temperature, top_k, seed, activations.value, as_json)


@app.command()
@guarded
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A TOML file; see examples/ and docs/configuration.md.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="For checkpoint, result and model (default: runs/NAME)."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what the folder holds of this run.")] = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu, or cuda where torch finds a GPU.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Train a network inside its seeds; an interrupted run goes on where it stood."""
    from rbe.cli import learn

    learn.train(config, output, restart, as_json, device)
