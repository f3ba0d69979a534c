"""What is refused before a run begins: networks that do not fit each other, and data that are not those of before."""

from typing import Any

import torch
from torch import nn

from rbe.errors import RbeError
from rbe.nn import Seeded
from rbe.train.config import Config
from rbe.train.language import read_tokenizer
from rbe.train.reading import find
from rbe.train.store import is_run, read_result
from rbe.train.task import TOKENIZER, Subwords, Task, checksum
from rbe.train.translation import Translation


def check_teacher(config: Config, teacher: nn.Module, model: nn.Module, task: Task) -> None:
    """Let both answer once, and compare.

    Raises:
        RbeError: the teacher does not take these inputs, or has other outputs.
    """
    batch = next(iter(task.batches(torch.Generator().manual_seed(0))))
    place = config.train.teacher
    with torch.no_grad():
        own = model.eval()(*batch.inputs)
        try:
            given = teacher(*batch.inputs)
        except (RuntimeError, IndexError, ValueError, TypeError) as cause:  # RbeError is a ValueError
            raise RbeError(
                f"train: the teacher {place} does not take the inputs of this run ({cause}); name another"
            ) from cause
    if given.shape != own.shape:
        raise RbeError(
            f"train: the teacher {place} has {given.shape[-1]} classes, this network {own.shape[-1]}; name another"
        )


def check_alphabet(config: Config, task: Task, folder: str | None) -> None:
    """Refuse a start or a teacher whose numbers stand for other characters or subwords, where it says what for.

    Raises:
        RbeError: they do.
    """
    if folder is None:
        return
    place = config.folder / folder
    known = is_run(place)
    inputs = read_result(place).inputs if known else {}
    own, given = task.alphabet, inputs.get("symbols")
    if isinstance(task, Subwords):
        path = (place if known else find(config, folder)) / inputs.get("tokenizer", TOKENIZER)
        # As dictionaries: one table can be written in several ways.
        own = task.tokenizer.get_vocab()
        given = read_tokenizer(path).get_vocab() if path.is_file() else None
    if given is not None and given != own:
        raise RbeError(
            f"train: the network in {folder} reads other symbols than these data have, or in another order; name one "
            "that was trained on the same"
        )


def check_sequences(config: Config, task: Task, teacher: nn.Module | None, model: nn.Module) -> None:
    """Refuse to translate with a network, or a teacher, that cannot.

    Raises:
        RbeError: it cannot.
    """
    if config.train.sequence_level and (not isinstance(task, Translation) or teacher is None):
        raise RbeError("train: [train] sequence_level is for translation with a teacher; leave it out")
    for what, network in (("network", model), ("teacher", teacher)):
        needed = what == "network" or config.train.sequence_level
        if isinstance(task, Translation) and network is not None and needed and not hasattr(network, "follow"):
            raise RbeError(
                f"train: the {what} cannot translate: {type(network).__name__} has no `encode` and `follow` as "
                "rbe.train.texts.Translator has them"
            )


def check_measured(config: Config, model: nn.Module) -> None:
    """Refuse a run without training whose blocks of seeds were only drawn.

    Raises:
        RbeError: `epochs` is 0, and the network has such seeds.
    """
    drawn = [name for name, m in model.named_modules() if isinstance(m, Seeded) and m.trainable]
    if not config.train.epochs and drawn:
        raise RbeError(
            f"train: [train] epochs is 0, but seeds in blocks, those of {drawn[0]}, do not begin at a start: random "
            "weights would be measured; give epochs, or format dense or stream"
        )


def contents(task: Task, *networks: nn.Module | None) -> int:
    """A checksum of what is learned from, and of the networks that teach or are started from."""
    start = task.check
    for network in dict.fromkeys(networks):
        start = checksum(*(() if network is None else network.state_dict().values()), start=start)
    return start


def check_saved(task: Task, content: int, saved: dict[str, Any]) -> None:
    """Refuse to go on with other data, another teacher or another start than those that a run began with.

    Raises:
        RbeError: they are others.
    """
    there, then = task.examples, saved.get("examples", task.examples)
    if there != then:
        raise RbeError(
            f"train: there are {there} examples to train on, and were {then} when the run was interrupted; put the "
            "data back, or start anew with --restart"
        )
    if saved.get("content", content) != content:
        raise RbeError(
            "train: the data, the teacher or the network to start from are not what they were when the run was "
            "interrupted; put them back, or start anew with --restart"
        )
