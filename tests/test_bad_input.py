"""Input that nobody means to give, each answered with one clear sentence."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import rbe
from rbe import RbeError, source
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
