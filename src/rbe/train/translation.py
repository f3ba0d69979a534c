"""Sentences into another language: BLEU."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rbe.errors import RbeError
from rbe.train.config import Config
from rbe.train.language import tokenizers
from rbe.train.reading import find
from rbe.train.task import NOTHING, Batch, Split, Subwords, check_symbols, checksum, device_of
from rbe.train.texts import Kept

PAD, BEGIN, END = 0, 1, 2
SOURCE, TARGET = "de", "en"
FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
# Translations end after so many subwords more than twice their source.
MORE = 10


class Translation(Subwords):
    """Pairs of sentences in subwords of both languages, which are learned from the sentences trained on."""

    metric, rises = "bleu", True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _sacrebleu()
        folder = find(config, config.data.path)
        self.lines = {part: tuple(_lines(folder / f"{name}.{side}.txt") for side in (SOURCE, TARGET))
                      for part, name in FILES.items()}  # fmt: skip
        for part, (one, two) in self.lines.items():
            if len(one) != len(two) or not one:
                raise RbeError(f"train: {folder}: {FILES[part]} has {len(one)} and {len(two)} lines; give pairs")
        self.tokenizer = _learn([*self.lines["train"][0], *self.lines["train"][1]], config.model.vocabulary)
        check_symbols(config, self.tokenizer.get_vocab_size())
        sides = [[torch.tensor(c.ids) for c in self.tokenizer.encode_batch(s)] for s in self.lines["train"]]
        most = config.data.length
        self.pairs = [(s, t) for s, t in zip(*sides, strict=True) if max(len(s), len(t)) <= most]
        if not self.pairs:
            raise RbeError(f"train: no sentence has at most {most} subwords; raise [data] length")

    @property
    def examples(self) -> int:
        """Pairs to train on."""
        return len(self.pairs)

    @property
    def check(self) -> int:
        """Of the sentences' subwords."""
        return checksum(*(side for pair in self.pairs for side in pair))

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Pairs in a random order, those of a batch about equally long."""
        size = self.config.train.batch
        order = torch.randperm(len(self.pairs), generator=generator).tolist()
        # Sorted within pools of many batches: little padding, and still another batch every time.
        pools = [order[k : k + 50 * size] for k in range(0, len(order), 50 * size)]
        sets = []
        for pool in pools:
            pool.sort(key=lambda k: len(self.pairs[k][0]) + len(self.pairs[k][1]))
            sets += [pool[k : k + size] for k in range(0, len(pool), size)]
        for k in torch.randperm(len(sets), generator=generator).tolist():
            source = pad_sequence([self.pairs[i][0] for i in sets[k]], batch_first=True, padding_value=PAD)
            goals = [self.pairs[i][1] for i in sets[k]]
            before = [torch.cat((torch.tensor([BEGIN]), goal)) for goal in goals]
            after = [torch.cat((goal, torch.tensor([END]))) for goal in goals]
            yield Batch(
                (source, pad_sequence(before, batch_first=True, padding_value=PAD)),
                pad_sequence(after, batch_first=True, padding_value=NOTHING),
            )

    def measure(self, model: nn.Module, split: Split) -> float:
        """BLEU of greedy translations, by sacrebleu on raw text."""
        source, wanted = self.lines[split]
        if split == "validation":
            source, wanted = source[: self.config.data.validation], wanted[: self.config.data.validation]
        return float(_sacrebleu().corpus_bleu(self.translate(model, source), [list(wanted)]).score)

    def translate(self, model: nn.Module, sentences: list[str]) -> list[str]:
        """As `translate`."""
        return translate(model, self.tokenizer, sentences)

    def told(self, teacher: nn.Module, tell: Callable[[int, int], object] | None = None) -> tuple[Tensor, Tensor]:
        """What a teacher makes of the sentences to train on.

        Args:
            tell: called now and then with the sentences done, and all.

        Returns:
            subwords of all translations one after another, and how many each has.
        """
        made = _translate(teacher, [source for source, _ in self.pairs], tell)
        return torch.cat(made), torch.tensor([len(one) for one in made])

    def retell(self, symbols: Tensor, counts: Tensor) -> None:
        """Learn what `told` returned, in place of the translations that were given.

        Source: Kim and Rush, Sequence-Level Knowledge Distillation, 2016, section 3.2.
        """
        targets = torch.split(symbols, counts.tolist())
        self.pairs = [(source, target) for (source, _), target in zip(self.pairs, targets, strict=True)]


def translate(network: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> list[str]:
    """Sentences in the other language; always the likeliest next subword.

    With a finished run of `rbe train examples/multi30k-stream.toml`:

        network = rbe.train.load("runs/multi30k-stream")
        tokenizer = tokenizers.Tokenizer.from_file("runs/multi30k-stream/tokenizer.json")
        translate(network, tokenizer, ["Ein Hund rennt durch den Schnee."])

    Args:
        network: a trained one.
        tokenizer: of the package `tokenizers`, which was learned with it.
        sentences: in the language that it reads.
    """
    codes = [torch.tensor(code.ids or [END]) for code in tokenizer.encode_batch(list(sentences))]
    made: list[str] = tokenizer.decode_batch([code.tolist() for code in _translate(network, codes)])
    return made


@torch.no_grad()
def _translate(
    model: nn.Module, codes: list[Tensor], tell: Callable[[int, int], object] | None = None, batch: int = 200
) -> list[Tensor]:
    """Subwords of sentences to those of their translations, without an end."""
    training = model.training
    model.eval()
    order = sorted(range(len(codes)), key=lambda k: len(codes[k]))
    out = list(codes)
    for k in range(0, len(order), batch):
        chosen = order[k : k + batch]
        source = pad_sequence([codes[i] for i in chosen], batch_first=True, padding_value=PAD)
        for i, made in zip(chosen, _greedy(model, source.to(device_of(model))).cpu(), strict=True):
            out[i] = made[made > END].clone()
        if tell is not None:
            tell(k + len(chosen), len(order))
    model.train(training)
    return out


def _greedy(model: Any, source: Tensor) -> Tensor:
    memory, there = model.encode(source)
    symbol = torch.full((len(source),), BEGIN, device=source.device)
    going = torch.ones(len(source), dtype=torch.bool, device=source.device)
    made: list[Tensor] = []
    kept: Kept = {}
    for at in range(2 * source.shape[1] + MORE):
        symbol = model.follow(symbol, at, memory, there, kept).argmax(-1)
        symbol = torch.where(going, symbol, PAD)
        made.append(symbol)
        going &= symbol != END
        if not going.any():
            break
    return torch.stack(made, 1)


def _learn(lines: list[str], size: int) -> Any:
    """Byte-level subwords; the same lines and size give the same ones."""
    package = tokenizers()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<begin>", "<end>"],
        show_progress=False,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return lines[:-1] if not lines[-1] else lines  # the end of the last line is no line
    except (OSError, UnicodeDecodeError) as cause:
        raise RbeError(f"train: {path} cannot be read as text ({cause})") from cause


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise RbeError("train: BLEU needs sacrebleu; install it with: pip install 'rbe[train]'") from None
    return sacrebleu
