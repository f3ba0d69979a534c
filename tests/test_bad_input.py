"""Input that nobody means to give, each answered with one clear sentence."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rbe
from rbe import RbeError, convert, shards, source
from rbe.nn import Linear

RBE = [sys.executable, "-c", "from rbe.cli import main; main()"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "a", "b", "--bits", "two"], "--bits"),
        (["compress", "a"], "DST"),
        (["nonsense"], "nonsense"),
        (["eval", "a"], "--against"),
    ],
)
def test_a_command_line_that_cannot_be_understood_is_one_json_object_too(arguments, says):
    pytest.importorskip("typer")
    ended = subprocess.run([*RBE, *arguments, "--json"], capture_output=True, text=True)
    assert ended.returncode == 2 and says in json.loads(ended.stdout)["error"] and "Usage" in ended.stderr
    assert subprocess.run([*RBE, *arguments], capture_output=True, text=True).stdout == ""


def test_an_interrupt_while_modules_are_imported_ends_in_one_line(tmp_path):
    pytest.importorskip("typer")
    # Like modules that turn the interrupt of what they import into an error of their own.
    code = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException as cause:
    raise RuntimeError("torn") from cause
"""
    (tmp_path / "typer.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    start = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  # ignored in background jobs
    for more, out in (([], ""), (["--json"], '{"error": "interrupted"}\n')):
        command = [*RBE, "verify", "x", *more]
        ended = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=start)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, out, "rbe: interrupted\n")


def test_the_package_can_be_run():
    pytest.importorskip("typer")
    ended = subprocess.run([sys.executable, "-m", "rbe", "--version"], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout[0].isdigit()


@pytest.mark.parametrize("about", ["text", 5, ["rbe"]])
def test_a_quantization_that_makes_no_sense_is_refused(tmp_path, bert, about):
    folder = shutil.copytree(bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    with pytest.raises(RbeError, match="quantized already"):
        source.open_source(folder)


@pytest.mark.parametrize("names", [5, "BertModel", [5], {}])
def test_architectures_that_make_no_sense_are_none(tmp_path, bert, names):
    folder = shutil.copytree(bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": names}))
    source.roles(source.open_source(folder))


@pytest.mark.parametrize("seed", [1 << 31, (1 << 63) - 1, 1 << 70])
def test_any_integer_is_a_seed(seed):
    weight = torch.randn(16, 16)
    assert rbe.encode(weight, effort="fast", seed=seed).decode().isfinite().all()


@pytest.mark.parametrize("weight", [[[1.0]], torch.ones(2, 2).numpy(), torch.eye(20).to_sparse()])
def test_what_is_no_dense_tensor_is_refused(weight):
    with pytest.raises(RbeError, match="the matrix is"):
        rbe.encode(weight)
    with pytest.raises(RbeError, match="seed"):
        rbe.encode(torch.ones(2, 2), seed=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_answers_in_the_dtype_of_its_input_whatever_its_bias_is(dtype):
    layer = Linear(32, 48)
    x = torch.randn(3, 32, dtype=dtype)
    assert layer(x).dtype == dtype and layer.to(dtype)(x.float()).dtype == torch.float32


@pytest.mark.parametrize("other", [{"effort": "balanced"}, {"seed": 5}])
def test_a_state_of_other_seeds_of_the_same_shape_is_refused(other):
    x = torch.randn(3, 32)
    first, second, third = (
        nn.Sequential(Linear.from_matrix(rbe.encode(torch.randn(32, 32), **{"effort": "fast", **how})))
        for how in ({}, {}, other)
    )
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second.load_state_dict(state)
    assert torch.equal(first(x), second(x))
    before = third(x)
    with pytest.raises(RuntimeError, match="0: the state is of a layer with"):
        third.load_state_dict(state)
    assert torch.equal(third(x), before)


def test_a_lazy_layer_is_left_alone_and_a_bad_weight_is_named():
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(5))
    assert len(rbe.compress_(model, effort="fast").seeded) == 1
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[3, 4] = float("nan")
    with pytest.raises(RbeError, match=r"^1\.weight: .*\(3, 4\)"):
        rbe.compress_(model, effort="fast")
    assert type(model[0]) is nn.Linear


@pytest.fixture
def weights(tmp_path):
    """A bare file, and the folder it was compressed to."""
    save_file({"a.weight": torch.randn(96, 96)}, tmp_path / "a.safetensors")
    convert.compress(tmp_path / "a.safetensors", tmp_path / "seeds", effort="fast")
    return tmp_path / "a.safetensors", tmp_path / "seeds"


@pytest.mark.parametrize("wrong", [OSError(errno.EFBIG, "File too large"), KeyboardInterrupt()])
def test_a_restoration_that_fails_leaves_nothing_behind(weights, tmp_path, monkeypatch, wrong):
    def put(file, data):
        raise wrong

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shards, "put", put)
    with pytest.raises((RbeError, KeyboardInterrupt), match=r"larger than this system allows|^$"):
        convert.decompress(weights[1], tmp_path / "dense")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_becomes_too_large_says_what_is_kept(weights, tmp_path, monkeypatch):
    def put(file, data):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(shards, "put", put)
    with pytest.raises(RbeError, match=r"larger than this system allows.*is kept"):
        convert.compress(weights[0], tmp_path / "again", effort="fast")


@pytest.mark.skipif(sys.platform == "darwin", reason="names there are always text")
def test_a_name_that_is_no_text_is_no_trouble_and_that_of_a_copied_file_is_refused_at_once(tmp_path, bert):
    folder = tmp_path / os.fsdecode(b"model\xff")
    shutil.copytree(bert, folder)
    convert.compress(folder, tmp_path / "seeds", effort="fast")
    assert "model?" in (tmp_path / "seeds" / "README.md").read_text()
    pytest.importorskip("typer")
    told = subprocess.run(
        [*RBE, "inspect", folder, "--json"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert "not compressed" in json.loads(told.stdout)["error"]
    (folder / os.fsdecode(b"notes\xff")).write_text("x")
    with pytest.raises(RbeError, match="rename the file"):
        source.open_source(folder)


def test_the_folder_one_stands_in_has_a_name(tmp_path, bert, monkeypatch):
    monkeypatch.chdir(bert)
    assert source.open_source(Path()).name == bert.name


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RbeError, match="is not a folder"):
        rbe.load(tmp_path / "file")


def test_numbers_too_large_to_be_rotated_are_refused_and_not_stored_as_nan(tmp_path):
    torch.manual_seed(0)
    save_file({"a.weight": 5e37 * torch.randn(64, 64)}, tmp_path / "a.safetensors")
    with pytest.raises(RbeError, match=r"a\.weight: its largest number"):
        convert.compress(tmp_path / "a.safetensors", tmp_path / "seeds", effort="fast")
    assert not (tmp_path / "seeds").exists()


def test_a_report_replaces_only_a_page(weights):
    pytest.importorskip("typer")
    from rbe.cli import work

    shard = next(weights[1].glob("*.safetensors"))
    for foreign in (shard, weights[0], weights[1]):
        with pytest.raises(RbeError, match="is no HTML page"):
            work.report(weights[1], foreign, None, None, None, as_json=True)
    shards.read_header(shard)
    page = weights[1].with_name("page.html")
    for _ in range(2):
        work.report(weights[1], page, None, None, None, as_json=True)
    assert page.read_text().lower().startswith("<!doctype html")


def test_models_that_texts_cannot_run_are_refused():
    pytest.importorskip("typer")
    transformers = pytest.importorskip("transformers")
    from rbe.cli import trial

    with torch.device("meta"):
        t5 = transformers.T5Model(transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
        vit = transformers.ViTModel(transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(RbeError, match="an encoder and a decoder"):
        trial.works(t5, None)
    with pytest.raises(RbeError, match="reads no text"):
        trial.works(vit, None)
