"""The commands on models in the packed formats."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="the models are transformers models")
typer_testing = pytest.importorskip("typer.testing", reason="the command line is built on typer")

from rbe import profile  # noqa: E402
from rbe.cli import trial  # noqa: E402
from rbe.cli.app import app  # noqa: E402


def rbe(*arguments: object, code: int = 0) -> Any:
    result = typer_testing.CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, f"{result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


def rbe_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    found = json.loads(rbe(*arguments, "--json", code=code).stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads the timings here."""
    whole = profile.time_each
    monkeypatch.setattr(profile, "time_each", lambda calls, **_: whole(calls, warm_up=1, repeats=2))
    monkeypatch.setattr(trial, "peak_memory", lambda *_: profile.Memory(1, 2, 3))


@pytest.fixture(scope="module")
def writer(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 in two stages of packed128, with outliers."""
    folder = tmp_path_factory.mktemp("cli") / "gpt2"
    options = ("--format", "packed128", "--block", "8", "--mode", "faithful", "--stages", "2", "--outliers", "0.01")
    rbe("compress", gpt2, folder, *options, "--effort", "fast", "--exclude", "*.wpe")
    return folder


def test_inspect_tells_format_mode_block_and_stages(writer: Path) -> None:
    told = rbe_json("inspect", writer)
    seeded = [row for row in told["tensors"] if row["kind"] != "keep"]
    assert seeded and all(row["spec"]["mode"] == "faithful" and row["spec"]["block"] == 8 for row in seeded)
    assert all(row["spec"]["stages"] == 2 and row["bits"] == 4.0 and 4.4 < row["rate"] < 5 for row in seeded)
    assert all(row["captured_energy"] == pytest.approx(1 - row["error"]) for row in seeded)
    assert all(row["floor"] == pytest.approx(2 ** (-2 * row["rate"])) for row in seeded)
    assert sum(told["parts"].values()) == told["bytes"] and told["parts"]["outliers"] > 0
    shown = rbe("inspect", writer).stdout
    assert "packed128 faithful 8x8 x2, 4 bit + 1 %" in shown and "captured" in shown


def test_every_command_runs(writer: Path, gpt2: Path, tmp_path: Path) -> None:
    told = rbe_json("verify", writer, gpt2)
    assert told["ok"] and told["fingerprint_checked"] and told["compared"] > 10
    assert rbe_json("eval", writer, "--against", gpt2, "--limit", 40)["fidelity"]["perplexity"] > 0
    assert rbe_json("generate", writer, "--prompt", "the cat", "--max-new-tokens", 3)["tokens"] >= 0
    page = tmp_path / "page.html"
    rbe("report", writer, "-o", page)
    assert "packed128 faithful 8x8 x2" in page.read_text(encoding="utf-8")
    rbe("decompress", writer, tmp_path / "dense")
    assert rbe_json("eval", writer, "--against", tmp_path / "dense", "--limit", 40)["fidelity"]["cosine"] > 0.9999


def test_a_dry_run_shows_the_exact_size(gpt2: Path, tmp_path: Path) -> None:
    options = ("--format", "packed64", "--block", "none", "--precision", "64")
    planned = rbe_json("compress", gpt2, tmp_path / "out", *options, "--dry-run")
    done = rbe_json("compress", gpt2, tmp_path / "out", *options, "--effort", "fast")
    seeded = [e for e in done["plan"]["entries"] if e["spec"] is not None]
    assert planned["plan"] == done["plan"] and seeded
    # One seed of 16 bytes a matrix, a scale, and two bytes a row of an embedding.
    parts = rbe_json("inspect", tmp_path / "out")["parts"]
    assert parts["seeds"] == 16 * len(seeded) and parts["scales"] == 4 * len(seeded)
    assert "packed64 Q0.64 whole" in rbe("compress", gpt2, tmp_path / "other", *options, "--dry-run").stdout


def test_a_bare_file_of_kernels_has_a_page_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"conv.weight": torch.randn(32, 16, 3, 3), "lstm.weight_ih_l0": torch.randn(64, 32)}
    save_file(tensors, tmp_path / "net.safetensors")
    rbe("compress", tmp_path / "net.safetensors", tmp_path / "seeds", "--format", "packed128")
    found = rbe_json("eval", tmp_path / "seeds", "--against", tmp_path / "net.safetensors")["tensors"]
    assert [one["name"] for one in found] == ["conv", "lstm.weight_ih_l0"] and found[0]["shape"] == [32, 144]
    rbe("report", tmp_path / "seeds", "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    # Once in the table, under the bars, and in the legend of the errors.
    assert page.count(">conv<") == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "packed128", "--bits", "2"), "is 0.5 bits a weight"),
        (("--format", "packed128", "--block", "edge"), "--block edge"),
        (("--block", "none"), "trellis"),
        (("--format", "packed64", "--mode", "faithful"), "mode 'faithful'"),
        (("--outliers", "2"), "no share"),
    ],
)
def test_what_cannot_be_is_said(gpt2: Path, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert says in rbe_json("compress", gpt2, tmp_path / "out", *options, code=1)["error"]
    assert list(tmp_path.iterdir()) == []


def test_eval_asks_about_another_architecture(writer: Path, gpt2: Path, tmp_path: Path) -> None:
    other = shutil.copytree(gpt2, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neo"}))
    result = typer_testing.CliRunner().invoke(app, ["eval", str(writer), "--against", str(other)])
    assert f"{writer} is a gpt2 and {other} a gpt_neo" in result.stderr


def test_the_floor_is_said_to_be_at_the_stored_rate(tmp_path: Path) -> None:
    save_file({"w.weight": torch.randn(40, 33)}, tmp_path / "w.safetensors")
    told = rbe_json("compress", tmp_path / "w.safetensors", tmp_path / "out", "--bits", "3", "--effort", "fast")
    (row,) = (row for row in rbe_json("inspect", tmp_path / "out")["tensors"] if row["kind"] != "keep")
    assert told["encoded"][0]["floor"] == 2.0**-6 and row["floor"] < 2.0**-10
    assert "at the stored rate" in rbe("inspect", tmp_path / "out").stdout
