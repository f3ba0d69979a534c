"""Folders that are not what they should be, given to the commands that run or show them."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="the models are transformers models")
typer_testing = pytest.importorskip("typer.testing", reason="the command line is built on typer")

import rbe as library  # noqa: E402
import rbe.hf  # noqa: E402
from rbe import convert  # noqa: E402
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
