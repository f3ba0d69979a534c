"""Translation end to end on made-up sentences, dense and in seeds, taught and not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sacrebleu
import tokenizers
import torch
from run_cases import Stopped
from torch import nn
from torch.nn import functional

from rbe.errors import RbeError
from rbe.nn import Seeded, Stream, StreamEmbedding
from rbe.train import Config, load, train
from rbe.train.config import Data, Layer, Model, Seeds
from rbe.train.networks import build
from rbe.train.texts import Block, Gpt, Kept, Translator
from rbe.train.translation import END, Translation, _greedy, translate

Make = Callable[[], Config]


def test_translation(pairs: Config, tmp_path: Path) -> None:
    config = replace(pairs, seeds=Seeds("dense"))
    result = train(config, tmp_path / "out")
    assert result.value > 50
    assert result.metric == "bleu"
    translation = Translation(config)
    assert translation.translate(load(tmp_path / "out"), ["zwei zwei zwei zwei"]) == [" two two two two"]


def test_somebody_who_has_only_the_folder_can_translate(pairs: Config, tmp_path: Path) -> None:
    result = train(replace(pairs, seeds=Seeds("dense")), tmp_path / "out")
    source, wanted = ((tmp_path / f"test_2016_flickr.{side}.txt").read_text().splitlines() for side in ("de", "en"))
    beside = tmp_path / "out" / result.inputs["tokenizer"]
    made = translate(load(tmp_path / "out"), tokenizers.Tokenizer.from_file(str(beside)), source)
    assert sacrebleu.corpus_bleu(made, [wanted]).score == pytest.approx(result.value)


def test_a_start_that_learned_other_subwords_is_refused(pairs: Config, tmp_path: Path) -> None:
    short = replace(pairs, seeds=Seeds("dense"), train=replace(pairs.train, epochs=1, steps=1))
    train(short, tmp_path / "before")
    for key in ("start", "teacher"):
        part = "model" if key == "start" else "train"
        named = replace(short, **{part: replace(getattr(short, part), **{key: "before"})})
        train(named, tmp_path / f"same {key}")
        for side in ("de", "en"):
            path = tmp_path / f"train.{side}.txt"
            path.write_text(path.read_text().swapcase())
        with pytest.raises(RbeError, match="the network in before reads other symbols"):
            train(named, tmp_path / f"other {key}")
        assert not (tmp_path / f"other {key}").exists()
        for side in ("de", "en"):
            path = tmp_path / f"train.{side}.txt"
            path.write_text(path.read_text().swapcase())


def test_a_student_of_sequences_learns_what_its_teacher_says(
    pairs: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that says the same of everything; asked once, also where the student is interrupted."""
    dense = replace(pairs, seeds=Seeds("dense"))
    train(replace(dense, train=replace(pairs.train, epochs=1, steps=1)), tmp_path / "teacher")
    asked: list[int] = []

    def told(task: Translation, teacher: nn.Module, tell: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(task.pairs))
        says = torch.tensor(task.tokenizer.encode("one").ids)
        return says.repeat(400), torch.full((400,), len(says))

    monkeypatch.setattr(Translation, "told", told)
    recipe = replace(pairs.train, teacher="teacher", sequence_level=True, weight=0.0)
    student = replace(dense, train=recipe)

    def stop(p: object) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(student, tmp_path / "out", stop)
    result = train(student, tmp_path / "out")
    assert asked == [400]
    assert result.curve == train(student, tmp_path / "whole").curve
    said = Translation(student).translate(load(tmp_path / "out"), ["zwei zwei zwei zwei", "drei"])
    assert said == [" one", " one"]


def test_a_student_with_its_own_teacher_and_data_that_changed(pairs: Config, tmp_path: Path) -> None:
    dense = replace(pairs, seeds=Seeds("dense"))
    train(dense, tmp_path / "teacher")
    student = replace(dense, train=replace(pairs.train, teacher="teacher", sequence_level=True))
    assert student.to_json()["train"]["sequence_level"] is True
    assert "sequence_level" not in dense.to_json()["train"]  # runs of before there was a choice are still known
    told: list[tuple[int, int]] = []

    def stop(p: object) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(student, tmp_path / "out", stop, told=lambda *n: told.append(n))
    assert told == [(200, 400), (400, 400)]
    texts = [tmp_path / f"train.{side}.txt" for side in ("de", "en")]
    whole = [text.read_text() for text in texts]
    for text, lines in zip(texts, whole, strict=True):
        text.write_text("".join(lines.splitlines(True)[:380]))
    with pytest.raises(RbeError, match="380 examples to train on, and were 400"):
        train(student, tmp_path / "out")
    for text, lines in zip(texts, whole, strict=True):
        text.write_text(lines)
    assert train(student, tmp_path / "out").value > 50
    # Nothing is translated where nothing is learned.
    told.clear()
    measured = replace(student, model=replace(student.model, start="teacher"), train=replace(student.train, epochs=0))
    train(measured, tmp_path / "measured", told=lambda *n: told.append(n))
    assert not told


def test_who_cannot_translate_is_refused_before_anything_is_translated(
    pairs: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = replace(pairs, seeds=Seeds("dense"))
    train(replace(dense, train=replace(pairs.train, epochs=1, steps=1)), tmp_path / "teacher")
    taught = replace(dense, train=replace(pairs.train, teacher="teacher", sequence_level=True))
    alone = replace(taught, train=replace(taught.train, teacher=None))
    with pytest.raises(RbeError, match="sequence_level is for translation with a teacher"):
        train(alone, tmp_path / "out")

    class Mute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(285, 285)

        def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.embed(target)

    monkeypatch.setattr(Translation, "told", lambda *_: pytest.fail("translated"))
    with pytest.raises(RbeError, match="the network cannot translate: Mute has no `encode`"):
        train(dense, tmp_path / "out", build=lambda _: Mute())
    monkeypatch.setattr("rbe.train.run.load", lambda _: Mute())
    with pytest.raises(RbeError, match="the teacher cannot translate: Mute"):
        train(taught, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_tells_every_sentence_in_its_place(pairs: Config, tmp_path: Path) -> None:
    config = replace(pairs, seeds=Seeds("dense"))
    train(config, tmp_path / "out")
    task, done = Translation(config), []
    teacher = load(tmp_path / "out")
    symbols, counts = task.told(teacher, lambda *n: done.append(n))
    assert done == [(200, 400), (400, 400)]
    task.retell(symbols, counts)
    said: dict[str, set[str]] = {}
    for source, target in task.pairs:
        said.setdefault(task.tokenizer.decode(source.tolist()), set()).add(task.tokenizer.decode(target.tolist()))
    assert {german: [english] for german, english in zip(said, task.translate(teacher, list(said)), strict=True)} == {
        german: list(english) for german, english in said.items()
    }
    assert len(said) == 5
    assert len(set(map(str, said.values()))) > 2


def test_what_is_kept_of_positions_says_the_same_as_reading_all_of_them_again() -> None:
    torch.manual_seed(0)
    model = Translator(Model(vocabulary=20, layers=2, size=16, heads=2, inner=32)).eval()
    model.decoder.append(model.decoder[0])  # a block can come twice
    source, target = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]), torch.randint(3, 20, (2, 7))
    kept: Kept = {}
    with torch.no_grad():
        memory, there = model.encode(source)
        scores = [model.follow(target[:, at], at, memory, there, kept) for at in range(7)]
        wanted = model(source, target)
    assert torch.stack(scores, 1).allclose(wanted, atol=1e-5)


def test_nothing_follows_the_end_of_a_translation() -> None:
    class Says(nn.Module):
        """One sentence ends after two subwords, the other after four."""

        def encode(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return source, source

        def follow(self, symbol: torch.Tensor, at: int, *_: object) -> torch.Tensor:
            says = torch.tensor([END if at in (2, 4) else 5 + at, END if at == 4 else 5 + at])
            return functional.one_hot(says, 20).float()

    made = _greedy(Says(), torch.tensor([[5, 6], [7, 8]]))
    assert made.tolist() == [[5, 6, END, 0, 0], [5, 6, 7, 8, END]]


def test_translation_in_seeds(pairs: Config, tmp_path: Path) -> None:
    losses: list[float] = []
    student = replace(pairs, train=replace(pairs.train, epochs=3, steps=10, lr=1e-2))
    result = train(student, tmp_path / "out", lambda p: losses.append(p.loss))
    assert losses[-1] < 0.7 * losses[0]
    names = [name for name, m in load(tmp_path / "out").named_modules() if isinstance(m, Seeded)]
    assert len(names) == 1 + 4 + 7
    assert result.ratio > 14  # blocks of 8 are 16:1, with sides that do not fill them


def test_translation_in_streams_with_bytes_of_two_groups(pairs: Config, tmp_path: Path) -> None:
    """Attention and feed-forward have a number of bytes each; the table is as it says, dense or a stream of its own."""
    losses: list[float] = []
    layers = (Layer("*.[io]*er", bytes=700), Layer("embed", format="dense"))
    config = replace(pairs, seeds=Seeds("stream", layer=layers, bytes=1500), train=replace(pairs.train, epochs=3))
    result = train(config, tmp_path / "out", lambda p: losses.append(p.loss))
    assert losses[-1] < 0.7 * losses[0]
    found = {name: len(m.seed) for name, m in load(tmp_path / "out").named_modules() if isinstance(m, Stream)}
    wide = [size for name, size in found.items() if name.endswith(("inner", "outer"))]
    assert (len(found), len(wide)) == (11, 4)
    assert sum(wide) <= 700
    assert sum(found.values()) - sum(wide) <= 1500
    assert result.seed_bytes == sum(found.values()) + 4 * 285 * 32
    assert {part.pattern: part.bytes for part in result.parts} == {
        "*.[io]*er": sum(wide), "": sum(found.values()) - sum(wide), "embed": 4 * 285 * 32,
    }  # fmt: skip
    table = replace(config, seeds=replace(config.seeds, layer=(Layer("embed", bytes=2000),)))
    made = build(table).embed
    assert isinstance(made, StreamEmbedding)
    assert train(replace(table, train=replace(table.train, epochs=1)), tmp_path / "table").seed_bytes <= 3500


def test_padding_changes_no_translation() -> None:
    model = Translator(Model(vocabulary=20, layers=1, size=16, heads=2, inner=32)).eval()
    one, two = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0]])
    torch.testing.assert_close(model(one, torch.tensor([[1, 4]])), model(two, torch.tensor([[1, 4]])))


def test_no_position_sees_a_later_one() -> None:
    model = Gpt(Config("g", Data("", length=8), Model(vocabulary=20, layers=2, size=16, heads=2, inner=32))).eval()
    one, two = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 9, 2]])
    torch.testing.assert_close(model(one)[:, :2], model(two)[:, :2])
    assert not torch.allclose(model(one)[:, 2], model(two)[:, 2])
    block = Block(Model(size=16, heads=2, inner=32), crosses=True)
    assert block(torch.zeros(1, 3, 16), torch.zeros(1, 5, 16), causal=True).shape == (1, 3, 16)


def test_a_last_line_without_an_end_is_one_too(pairs: Config, tmp_path: Path) -> None:
    whole = Translation(pairs).lines
    for path in tmp_path.glob("**/*.de.txt"):
        path.write_text(path.read_text().removesuffix("\n"))
    assert Translation(pairs).lines == whole
