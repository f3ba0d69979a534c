"""The command line as a user meets it: every command on tiny models, and every mistake answered clearly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the models are transformers models")
typer_testing = pytest.importorskip("typer.testing", reason="the command line is built on typer")

from conftest import TEXT  # noqa: E402

from rbe import calibrate, checkpoint, convert, metrics, profile, sensitivity  # noqa: E402
from rbe.cli import show, trial, work  # noqa: E402
from rbe.cli.app import app  # noqa: E402
from rbe.errors import RbeError  # noqa: E402
from rbe.source import open_source  # noqa: E402

RBE = [sys.executable, "-c", "from rbe.cli import main; main()"]


def rbe(*arguments: object, code: int = 0) -> Any:
    result = typer_testing.CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, f"{result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


def rbe_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = rbe(*arguments, "--json", code=code)
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def refused(*arguments: object, says: str) -> None:
    """The command ends with code 1, one message on standard error and the same as JSON, and no traceback."""
    plain = rbe(*arguments, code=1)
    assert says in plain.stderr and plain.stderr.startswith("rbe: ") and "Traceback" not in plain.stderr
    assert plain.stdout == ""
    assert says in rbe_json(*arguments, code=1)["error"]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads the timings here."""
    whole = profile.time_each
    monkeypatch.setattr(profile, "time_each", lambda calls, **_: whole(calls, warm_up=1, repeats=2))
    monkeypatch.setattr(trial, "peak_memory", lambda *_: profile.Memory(1, 2, 3))


@pytest.fixture(scope="module")
def small(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed BERT."""
    folder = tmp_path_factory.mktemp("cli") / "bert-2bit"
    rbe("compress", bert, folder, "--bits", "2", "--effort", "fast")
    return folder


@pytest.fixture(scope="module")
def writer(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed GPT-2."""
    folder = tmp_path_factory.mktemp("cli") / "gpt2-4bit"
    rbe("compress", gpt2, folder, "--bits", "4", "--effort", "fast")
    return folder


def test_compress_tells_what_it_did(bert: Path, tmp_path: Path) -> None:
    told = rbe_json("compress", bert, tmp_path / "out", "--effort", "fast", "--exclude", "*pooler*", "--seed", "3")
    assert told["path"] == str(tmp_path / "out")
    on_disk = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert told["nbytes"] == on_disk and told["ratio"] == pytest.approx(told["fp32_bytes"] / on_disk)
    assert not any("pooler" in one["name"] for one in told["encoded"])
    again = rbe("compress", bert, tmp_path / "out2", "--effort", "fast", "--bits", "1.5", "--include", "*query*")
    assert "against float32" in again.stdout and "2 matrices" in again.stdout


def test_a_dry_run_writes_nothing(bert: Path, tmp_path: Path) -> None:
    told = rbe("compress", bert, tmp_path / "out", "--dry-run")
    assert "encoder.layer.0.attention.self.query.weight" in told.stdout and "trellis 2 bit" in told.stdout
    assert rbe_json("compress", bert, tmp_path / "out", "--dry-run")["dry_run"] is True
    assert list(tmp_path.iterdir()) == []


def test_shards_threads_and_embeddings_are_passed_on(bert: Path, tmp_path: Path) -> None:
    options = ("--effort", "fast", "--max-shard-size", "20KB", "--threads", "1", "--embeddings-bits", "0")
    rbe("compress", bert, tmp_path / "out", *options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    kinds = {row["name"]: row["kind"] for row in rbe_json("inspect", tmp_path / "out")["tensors"]}
    assert kinds["embeddings.word_embeddings.weight"] == "keep"


def test_inspect_counts_every_byte(small: Path) -> None:
    told = rbe_json("inspect", small)
    on_disk = sum(p.stat().st_size for p in small.glob("*.safetensors"))
    assert told["bytes"] == on_disk == sum(told["parts"].values())
    assert set(told["parts"]) >= {"seeds", "scales", "row scales", "norms", "biases", "headers"}
    assert told["ratio_fp32"] == pytest.approx(4 * told["weights"] / on_disk)
    seeded = [row for row in told["tensors"] if row["kind"] != "keep"]
    assert all(row["floor"] < row["error"] < 0.2 for row in seeded)
    assert (
        told["parts"]["seeds"]
        == sum(r["weights"] for r in [{"weights": r["shape"][0] * r["shape"][1]} for r in seeded]) // 4
    )


def test_inspect_tells_energy_and_efficiency(small: Path) -> None:
    for row in rbe_json("inspect", small)["tensors"]:
        if row["kind"] != "keep":
            assert row["captured_energy"] == pytest.approx(1 - row["error"])
            assert row["efficiency"] == pytest.approx(metrics.least_rate(row["error"]) / row["rate"])
            assert 0.7 < row["efficiency"] < 1 and "spectrum" not in row
    shown = rbe("inspect", small).stdout
    assert "captured" in shown and "eta" in shown and "spectral" not in shown
    first = next(row for row in rbe_json("inspect", small)["tensors"] if row["kind"] != "keep")
    assert f"{100 * first['captured_energy']:.2f} %" in shown and f"{first['efficiency']:.3f}" in shown


def test_inspect_beside_the_source_compares_singular_values(small: Path, bert: Path) -> None:
    name = "encoder.layer.1.output.dense"
    rows = {row["name"]: row for row in rbe_json("inspect", small, "--against", bert)["tensors"]}
    found = rows[name]["spectrum"]
    matrices, _ = checkpoint.load_matrices(small)
    weight = open_source(bert).tensors[f"{name}.weight"].read()
    ours, wanted = matrices[name].decode(), weight.float()
    assert found["error"] == pytest.approx(rows[name]["error"], rel=1e-3)
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(ours, wanted))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(ours, wanted))
    assert found["relative_error"] == pytest.approx(found["error"] ** 0.5) and found["stability"] is None
    assert found["floor"] < found["error"] and 0.7 < found["efficiency"] < 1
    assert found["spectral_error"] == pytest.approx(metrics.spectral_error(ours, wanted))
    assert found["principal"] == pytest.approx(metrics.principal_ratio(ours, wanted, 16))
    assert found["lipschitz"] == pytest.approx([metrics.lipschitz(wanted), metrics.lipschitz(ours)])
    assert found["condition"] == pytest.approx([metrics.condition(wanted), metrics.condition(ours)])
    assert found["uncertainty"] == 0.0 and "spectrum" not in rows["embeddings.LayerNorm.weight"]
    shown = rbe("inspect", small, "--against", bert).stdout
    peers = found["peers"]
    assert peers["captured"] == pytest.approx(1 - found["error"]) and peers["captured"] > peers["svd"] > 0
    assert peers["dct"] < peers["ceiling"] == pytest.approx(1 - 2 ** (-2 * peers["bits"]))
    assert "energy kept at equal bytes" in shown and "DCT" in shown
    assert "PCR_16" in shown and "Lipschitz" in shown and "spectral error" in shown


def test_inspect_beside_the_source_tells_how_far_packed_seeds_move_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w.weight": torch.randn(48, 64, generator=torch.Generator().manual_seed(0))}, tmp_path / "a.safetensors")
    for format in ("packed64", "packed128"):
        folder = tmp_path / f"{format}.safetensors"
        rbe("compress", tmp_path / "a.safetensors", folder, "--format", format)
        (row,) = rbe_json("inspect", folder, "--against", tmp_path / "a.safetensors")["tensors"]
        found = row["spectrum"]["stability"]
        assert 1 <= found["rank"] <= 2 and 0 < found["storage"] < found["weight"] < 1e-3 < found["largest"]
        shown = rbe("inspect", folder, "--against", tmp_path / "a.safetensors").stdout
        assert "Jacobian rank" in shown and "storage bound" in shown and "MSE" in shown


def test_large_matrices_beside_the_source_say_how_sure_they_are(
    small: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = metrics.spectrum
    monkeypatch.setattr(metrics, "spectrum", lambda matrix: whole(matrix, full=20))
    found = rbe_json("inspect", small, "--against", bert)["tensors"][0]["spectrum"]
    assert found["uncertainty"] > 0 and found["condition"] is None
    assert "+-" in rbe("inspect", small, "--against", bert).stdout


def test_inspect_beside_another_model_is_refused(small: Path, gpt2: Path) -> None:
    refused("inspect", small, "--against", gpt2, says="is it the source?")


def test_inspect_beside_a_source_of_another_shape_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, shape in (("a", (64, 48)), ("b", (48, 64))):
        save_file({"w.weight": torch.randn(shape)}, tmp_path / f"{name}.safetensors")
    rbe("compress", tmp_path / "a.safetensors", tmp_path / "out", "--effort", "fast")
    refused("inspect", tmp_path / "out", "--against", tmp_path / "b.safetensors", says="no 64x48 weight w")


def test_inspect_shows_tables(small: Path) -> None:
    brief, whole = rbe("inspect", small).stdout, rbe("inspect", small, "--all").stdout
    assert "encoder.layer.1.output.dense" in brief and "against float16" in brief and "others" in brief
    assert "encoder.layer.1.output.LayerNorm.weight" in whole and "LayerNorm" not in brief


def test_verify_by_itself_and_with_the_source(small: Path, bert: Path) -> None:
    told = rbe_json("verify", small)
    assert told["ok"] and told["fingerprint_checked"] and told["compared"] == 0
    assert rbe_json("verify", small, bert)["compared"] > 10
    assert "sound" in rbe("verify", small).stdout


def test_verify_finds_a_flipped_bit_and_another_source(small: Path, gpt2: Path, tmp_path: Path) -> None:
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(small, bad)
    shard = next(bad.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 16
    shard.write_bytes(data)
    told = rbe_json("verify", bad, code=1)
    assert told["ok"] is False and len(told["problems"]) == 1 and told["problems"][0] in told["error"]
    plain = rbe("verify", bad, code=1)
    assert "not sound" in plain.stderr and plain.stdout == ""
    assert not rbe_json("verify", small, gpt2, code=1)["ok"]


def test_eval_of_an_encoder(small: Path, bert: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\nseven bakers sold bread\nthe old mill\n")
    for activations in ("float32", "int8"):
        told = rbe_json("eval", small, "--against", bert, "--text", text, "--activations", activations)
        assert told["fidelity"]["kind"] == "encoder" and told["fidelity"]["samples"] == 3
        assert 0.5 < told["fidelity"]["cosine"] < 1 and told["speed"]
        assert told["activations"] == activations
    shown = rbe("eval", small, "--against", bert)
    assert "cosine" in shown.stdout and "texts a second" in shown.stdout


def test_eval_of_a_language_model(writer: Path, gpt2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\nseven bakers sold bread\n" * 5)
    told = rbe_json("eval", writer, "--against", gpt2, "--text", text, "--limit", "40")["fidelity"]
    assert told["kind"] == "language model" and told["samples"] == 39
    assert told["perplexity"] == pytest.approx(told["reference_perplexity"], rel=0.2) and told["kl"] > 0
    assert "perplexity per token" in rbe("eval", writer, "--against", gpt2, "--text", text).stdout


def test_decompress_gives_a_model_that_answers_the_same(small: Path, bert: Path, tmp_path: Path) -> None:
    told = rbe_json("decompress", small, tmp_path / "dense")
    assert told["path"] == str(tmp_path / "dense") and told["bytes"] > 100_000
    from rbe import evaluate

    same = evaluate.compare(trial.load(tmp_path / "dense"), trial.load(small), trial.load_tokenizer(small))
    assert same.error < 1e-6


def test_report_writes_one_page(small: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "peak_memory", lambda folder: profile.Memory(10, 20, 3_000_010))
    told = rbe_json("report", small, "-o", tmp_path / "deep" / "r.html")
    page = (tmp_path / "deep" / "r.html").read_text()
    assert told["bytes"] == len(page.encode()) and "Shannon floor" in page
    rbe("report", small, "-o", tmp_path / "with.html", "--against", bert)
    for shown in ("MSE", "MAE", "PCR_16", "Lipschitz constant", "condition", "ceiling", "SVD", "DCT", "eta"):
        assert f"{shown}</th>" in (tmp_path / "with.html").read_text()
    assert "peak memory" in (tmp_path / "with.html").read_text() and "3 MB" in (tmp_path / "with.html").read_text()
    refused("report", small, "-o", tmp_path / "no.html", "--text", tmp_path / "x", says="--against")


def test_profile_of_both_kinds(small: Path, bert: Path) -> None:
    seeds, dense = rbe_json("profile", small), rbe_json("profile", bert)
    assert seeds["files"]["weights"] < dense["files"]["weights"] / 5
    assert seeds["tensor_bytes"] < dense["tensor_bytes"] / 5
    assert seeds["operations"]["one text"]["macs"] == dense["operations"]["one text"]["macs"] > 0
    assert seeds["memory"]["peak"] >= seeds["memory"]["start"] > 0


def test_generate_continues(writer: Path) -> None:
    told = rbe("generate", writer, "--prompt", "the cat", "--max-new-tokens", "6", "--temperature", "0").stdout
    assert told.startswith("the cat")
    one, two = (rbe_json("generate", writer, "--prompt", "the cat", "--seed", "5")["text"] for _ in range(2))
    assert one == two
    assert (
        rbe_json("generate", writer, "--prompt", "the", "--activations", "int8", "--max-new-tokens", "3")["seconds"] > 0
    )


def test_a_bare_file_goes_there_and_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    source = tmp_path / "w.safetensors"
    save_file({"a.weight": torch.randn(64, 48), "a.bias": torch.randn(64)}, source)
    rbe("compress", source, tmp_path / "out", "--effort", "fast")
    told = rbe_json("eval", tmp_path / "out", "--against", source)["tensors"]
    assert [one["name"] for one in told] == ["a"] and told[0]["error"] < 0.09 and 0.94 < told[0]["cosine"] < 0.99
    assert "output cosine" in rbe("eval", tmp_path / "out", "--against", source).stdout
    assert rbe_json("verify", tmp_path / "out", source)["fingerprint_checked"] is False
    assert rbe_json("inspect", tmp_path / "out")["parts"]["biases"] == 256
    rbe("report", tmp_path / "out", "-o", tmp_path / "r.html")
    rbe("decompress", tmp_path / "out", tmp_path / "back.safetensors")
    assert set(load_file(tmp_path / "back.safetensors")) == {"a.weight", "a.bias"}
    refused("profile", tmp_path / "out", says="cannot be run")


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "{}"),
        ("verify", "{}"),
        ("compress", "{}", "out"),
        ("decompress", "{}", "out"),
        ("report", "{}"),
        ("profile", "{}"),
        ("generate", "{}", "--prompt", "x"),
        ("eval", "{}", "--against", "{}"),
    ],
    ids=lambda c: c[0],
)
def test_a_folder_that_is_not_there(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*(c.format(tmp_path / "nowhere") for c in command), says="does not exist")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_answered(small: Path, bert: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("compress", empty, tmp_path / "o", says="not a transformers model")
    refused("compress", bert, tmp_path / "o", "--bits", "2.3", says="not offered")
    refused("compress", bert, tmp_path / "o", "--embeddings-bits", "7", says="not offered")
    refused("compress", bert, tmp_path / "o", "--exclude", "*nothing*", says="fits no tensor")
    refused("compress", bert, tmp_path / "o", "--max-shard-size", "huge", says="huge")
    refused("compress", small, tmp_path / "o", says="compressed already")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused("compress", bert, tmp_path / "mine", says="mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    for command in ("inspect", "verify", "report"):
        refused(command, bert, says="not compressed")
    refused("decompress", bert, tmp_path / "o", says="not compressed")
    refused("eval", bert, "--against", bert, says="not compressed")
    refused("eval", small, "--against", bert, "--text", tmp_path / "none.txt", says="none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused("eval", small, "--against", bert, "--text", tmp_path / "latin.txt", says="latin.txt")
    refused("profile", bert, "--activations", "int8", says="dense model")
    refused("generate", small, "--prompt", "x", says="does not write text")
    assert not (tmp_path / "o").exists()


def test_wrong_usage_is_code_2() -> None:
    assert "Usage" in rbe("compress", code=2).stderr
    rbe("inspect", "x", "--nonsense", code=2)
    rbe("compress", "a", "b", "--effort", "heroic", code=2)
    assert "train" in rbe("--help").stdout


def test_a_model_that_is_damaged_or_has_no_tokenizer(writer: Path, gpt2: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(writer, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    refused("generate", bare, "--prompt", "the", says="no tokenizer")
    (bare / "config.json").write_text("{")
    refused("generate", bare, "--prompt", "the", says="config.json")


def test_missing_extras_are_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("report", small, "-o", os.devnull, says="rbe[report]")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "rbe.hf", raising=False)
    refused("profile", small, says="rbe[hf]")


def test_without_typer_the_command_says_so() -> None:
    code = "import sys; sys.modules['typer'] = None; from rbe.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "rbe[cli]" in done.stderr and "Traceback" not in done.stderr


def test_system_errors_have_no_traceback(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(work, "inspect", full)
    refused("inspect", small, says="No space left on device: /somewhere")

    for hungry in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):

        def fail(*_: object, hungry: Exception = hungry) -> None:
            raise hungry

        monkeypatch.setattr(work, "inspect", fail)
        refused("inspect", small, says="out of memory")


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\ntry:\n from rbe.cli import main\n sys.argv = ['rbe', '--help']\n main()\n"
        "except SystemExit as end:\n assert not end.code\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "compress" in done.stdout


def test_an_interrupt_keeps_the_work_and_the_same_command_goes_on(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source, target = tmp_path / "w.safetensors", tmp_path / "out"
    save_file({f"layer.{k}.weight": torch.randn(384, 512) for k in range(40)}, source)
    command = [*RBE, "compress", str(source), str(target), "--threads", "1", "--effort", "fast"]

    def heed() -> None:
        """A shell's background jobs ignore interrupts, and so would all that they start."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    journal = tmp_path / ".out.rbe-partial" / "journal.jsonl"
    while run.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "goes on from there" in error and "Traceback" not in error
    assert not target.exists()
    told = rbe_json("compress", source, target, "--effort", "fast")
    assert told["resumed"] >= 1
    whole = convert.compress(source, tmp_path / "whole", effort="fast")
    assert whole.nbytes == told["nbytes"]
    for file in target.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


@pytest.mark.parametrize("option", ["--all", "--json"])
def test_a_closed_pipe_is_no_drama(small: Path, option: str) -> None:
    run = subprocess.Popen(
        [*RBE, "inspect", str(small), option], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()
    error = run.stderr.read()
    run.stderr.close()
    assert run.wait() == 1 and error == ""


def test_progress_says_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with show.Steps("encoding", "weights", every=0.0) as steps:
        steps(0, 1000)
        time.sleep(0.01)
        steps(500, 1000, "layer.1")
    said = capsys.readouterr()
    assert said.out == "" and "50 %" in said.err and "weights/s" in said.err and "left" in said.err
    with show.Steps("encoding", "weights", silent=True, every=0.0) as steps:
        steps(500, 1000)
    assert capsys.readouterr().err == ""


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    show.machine({"a": float("nan"), "b": [float("inf"), 1.0], "p": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.0], "p": "x"}


def test_a_source_of_another_shape_is_said(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.randn(64, 48)}, tmp_path / "w.safetensors")
    save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "v.safetensors")
    convert.compress(tmp_path / "w.safetensors", tmp_path / "out", effort="fast")
    with pytest.raises(RbeError, match="has no 64x48 weight"):
        trial.compare_tensors(tmp_path / "out", tmp_path / "v.safetensors")


def test_rate_of_a_pattern(bert: Path, tmp_path: Path) -> None:
    rbe("compress", bert, tmp_path / "out", "--effort", "fast", "--rate", "*.attention.*=3")
    bits = {row.name: row.bits for row in checkpoint.inspect(tmp_path / "out") if row.kind != "keep"}
    assert {b for name, b in bits.items() if ".attention." in name} == {3}
    assert {b for name, b in bits.items() if ".attention." not in name} == {2}


@pytest.mark.parametrize("option", ["--allocate", "--calibrate"])
def test_the_dense_model_is_run_first(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr(calibrate, "TOKENS", 1024)
    monkeypatch.setitem(sensitivity.INPUTS, "tokens", 1024)
    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    bits = ("--bits", "2.2" if option == "--allocate" else "2")
    weights = set()
    for number, how in enumerate(("random", tmp_path / "text.txt", None)):
        more = () if how is None else (option, how)
        rate = bits if how is not None else ()
        told = rbe_json("compress", bert, tmp_path / str(number), *rate, *more, "--effort", "fast")
        rates = {entry["spec"]["bits"] for entry in told["encoded"]}
        assert len(rates) == 1 if how is None or option == "--calibrate" else len(rates) > 1
        weights |= {file.read_bytes() for file in (tmp_path / str(number)).glob("*.safetensors")}
        assert rbe_json("verify", tmp_path / str(number), bert)["ok"]
    assert len(weights) == 3
    assert told["nbytes"] < rbe_json("inspect", tmp_path / "0")["bytes"] or option == "--calibrate"
    refused("compress", bert, tmp_path / "out", option, tmp_path / "none.txt", says=f"{option[2:]}: ")
    refused("compress", bert, tmp_path / "out", option, "random", "--format", "packed64", says="trellis")
    refused("compress", bert / "model.safetensors", tmp_path / "out", option, "random", says="cannot be run")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["attention", "=3", "*.attention.*=three"])
def test_a_rate_written_wrongly_is_explained(bert: Path, tmp_path: Path, text: str) -> None:
    refused("compress", bert, tmp_path / "out", "--rate", text, says="PATTERN=BITS")
