"""Folders that are not what they should be, given to the commands that run or show them."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="the models are transformers models")
typer_testing = pytest.importorskip("typer.testing", reason="the command line is built on typer")

import rbe as library  # noqa: E402
import rbe.hf  # noqa: E402
from rbe import checkpoint, convert  # noqa: E402
from rbe.cli.app import app  # noqa: E402
from rbe.errors import CorruptFile  # noqa: E402


def rbe_fails(*arguments: object) -> str:
    """What a command says on standard error when it ends with code 1."""
    result = typer_testing.CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 1, f"{result.exit_code}\n{result.stdout}\n{result.stderr}"
    return str(result.stderr)


@pytest.fixture(scope="module")
def damaged(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed GPT-2 in whose seeds one bit was turned over."""
    folder = tmp_path_factory.mktemp("damaged") / "gpt2"
    convert.compress(gpt2, folder, effort="fast", threads=1)
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "{}", "--against", "{dense}"],
        ["generate", "{}", "--prompt", "the"],
        ["profile", "{}"],
        ["report", "{}"],
        ["report", "{}", "--against", "{dense}"],
        ["inspect", "{}"],
    ],
)
def test_every_command_refuses_a_damaged_folder(damaged: Path, gpt2: Path, command: list[str]) -> None:
    filled = [word.format(damaged, dense=gpt2) for word in command]
    assert "was changed after it was written" in rbe_fails(*filled)


def test_the_plug_in_refuses_a_damaged_folder(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="was changed"):
        library.hf.load(damaged)
    cut = Path(shutil.copytree(damaged, tmp_path / "cut"))
    (cut / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CorruptFile, match="not readable JSON"):
        library.hf.load(cut)


@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_a_folder_of_save_pretrained_is_told_apart_from_a_broken_one(gpt2: Path, tmp_path: Path, shard: str) -> None:
    config: Any = library.hf.RbeConfig(bits=2, effort="fast")
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2, quantization_config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "plain", max_shard_size=shard)
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    for command in ("inspect", "verify"):
        told = rbe_fails(command, tmp_path / "plain")
        assert "written by save_pretrained" in told and "rbe.save" in told and "fetch" not in told
    library.hf.load(tmp_path / "plain")


def lacking(gpt2: Path, folder: Path, name: str) -> Path:
    """A copy of a dense folder without one of its tensors."""
    shutil.copytree(gpt2, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_a_source_lacks_is_said_and_its_random_answer_is_not_stored(gpt2: Path, tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    done = convert.compress(lacking(gpt2, tmp_path / "dense", name), tmp_path / "seeds", effort="fast", threads=1)
    assert any(name in remark and "random" in remark for remark in done.remarks)
    assert done.fingerprint is None and checkpoint.verify(tmp_path / "seeds", answers=library.hf.check_fingerprint).ok
    whole = convert.compress(gpt2, tmp_path / "whole", effort="fast", threads=1)
    assert whole.remarks == () and whole.fingerprint is not None  # the head is tied to the table


def test_an_answer_that_does_not_hang_on_what_is_lacking_is_stored(bert: Path, tmp_path: Path) -> None:
    source = lacking(bert, tmp_path / "dense", "pooler.dense.weight")
    done = convert.compress(source, tmp_path / "seeds", effort="fast", threads=1)
    assert any("pooler.dense.weight" in remark for remark in done.remarks)
    assert done.fingerprint is not None and done.fingerprint["output"] == "last_hidden_state"
    assert checkpoint.verify(tmp_path / "seeds", answers=library.hf.check_fingerprint).ok


def test_a_wrong_answer_names_what_the_folder_lacks(gpt2: Path, tmp_path: Path) -> None:
    source = lacking(gpt2, tmp_path / "dense", "transformer.h.0.mlp.c_proj.bias")
    convert.compress(source, tmp_path / "seeds", effort="fast", threads=1)
    convert.compress(gpt2, tmp_path / "whole", effort="fast", threads=1)
    stored = checkpoint.read_fingerprint(tmp_path / "whole")
    assert stored is not None
    told = library.hf.check_fingerprint(tmp_path / "seeds", {**stored, "norm": 2 * stored["norm"]})
    assert told is not None and "transformer.h.0.mlp.c_proj.bias" in told


def test_eval_refuses_a_model_of_another_kind(gpt2: Path, bert: Path, tmp_path: Path) -> None:
    convert.compress(gpt2, tmp_path / "seeds", effort="fast", threads=1)
    told = rbe_fails("eval", tmp_path / "seeds", "--against", bert)
    assert "is a gpt2" in told and "a bert" in told and "Traceback" not in told


def test_eval_says_what_it_ran_on_and_how_much_memory_it_took(gpt2: Path, tmp_path: Path) -> None:
    convert.compress(gpt2, tmp_path / "seeds", effort="fast", threads=1)
    command = ["eval", str(tmp_path / "seeds"), "--against", str(gpt2), "--limit", "40"]
    shown = typer_testing.CliRunner().invoke(app, command).stdout
    assert "run on built-in text, " in shown and "--text" in shown and "peak memory" in shown
    (tmp_path / "seeds" / "tokenizer.json").unlink()
    told = json.loads(typer_testing.CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert told["text"] == "built in" and told["peak_memory"]["seeds"] > 0


def test_a_model_that_wants_more_than_tokens_says_what(tmp_path: Path) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tiny, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**tiny, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "dense")
    done = convert.compress(tmp_path / "dense", tmp_path / "seeds", effort="fast", threads=1)
    assert any("wants pixel_values" in remark for remark in done.remarks)


def test_shares_beside_the_seeds_are_explained(gpt2: Path, tmp_path: Path) -> None:
    options = ["--outliers", "0.01", "--effort", "fast"]
    planned = typer_testing.CliRunner().invoke(app, ["compress", str(gpt2), str(tmp_path / "s"), *options, "--dry-run"])
    assert "+ x %:" in planned.stdout and "headers not counted" in planned.stdout
    typer_testing.CliRunner().invoke(app, ["compress", str(gpt2), str(tmp_path / "s"), *options])
    assert "+ x %:" in typer_testing.CliRunner().invoke(app, ["inspect", str(tmp_path / "s")]).stdout
