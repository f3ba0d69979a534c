"""Tables of tokens with more bits for their first rows, through plans, folders, live models and the command line."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rbe
from rbe import allocate, budget, checkpoint, compress_, convert, decompress_
from rbe.allocate import make_plan
from rbe.errors import RbeError

transformers = pytest.importorskip("transformers")

RATES = {"*word_embeddings": ((16, 3.0), (48, 1.5), (None, 1.0)), "*wte": ((16, 3.0), (48, 1.5), (None, 1.0))}


@pytest.fixture(autouse=True)
def _small_grades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_FIRST_GRADE", 16)


def _rates(folder: Path) -> dict:
    name = "*word_embeddings" if "bert" in json.loads((folder / "config.json").read_text())["model_type"] else "*wte"
    return {name: RATES[name]}


def test_a_plan_fits_grades_to_the_rows() -> None:
    tensors = {"emb.weight": ((200, 64), "F32"), "a.weight": ((64, 64), "F32")}
    rate = ((32, 3.0), (96, 1.5), (4096, 1.0), (None, 0.5))
    plan = make_plan(tensors, rates={"emb": rate})
    spec = plan.seeded[0].spec
    assert spec is not None and spec.grades == ((32, 3.0), (96, 1.5), (200, 1.0))
    assert plan.seeded[0].nbytes == 8 * 2 * 4 * (2 * 6 + 4 * 3 + 7 * 2) + 4 + 400
    assert allocate.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert "(3, 1.5, 1)" in plan.seeded[0].format
    assert allocate.floor(spec) == pytest.approx((2 * 2**-6 + 4 * 2**-3 + 7 * 2**-2) / 13)
    for wrong, words in (
        ({"a": rate}, "no embedding"),
        ({"emb": ((30, 3.0), (None, 1.0))}, "steps of 16"),
        ({"emb": ((32, 3.0), (16, 1.0))}, "rise"),
        ({"emb": ((32, 3.3), (None, 1.0))}, "3.3"),
        ({"emb": ((32, "x"), (None, 1.0))}, "no number"),
        ({"emb": ()}, "no grades"),
        ({"emb": ((32, 3.0), (0, 1.0))}, "rise"),
        ({"emb": ((32, 3.0), (96, 1.0))}, "the rest"),
        ({"emb": ((32,),)}, "no grades"),
    ):
        with pytest.raises(RbeError, match=words):
            make_plan(tensors, rates=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])  # gpt2: the output head is tied to the table
def test_a_folder_comes_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import rbe.hf as hf

    source: Path = request.getfixturevalue(kind)
    done = convert.compress(source, tmp_path / "seeds", effort="fast", rates=_rates(source))
    assert checkpoint.verify(done.path, source, hf.check_fingerprint).ok
    graded = [row for row in checkpoint.inspect(done.path) if row.spec is not None and row.spec.grades]
    assert len(graded) == 1 and graded[0].nbytes == next(e.nbytes for e in done.plan.seeded if e.spec.grades)
    model = rbe.load(done.path)
    matrix = checkpoint.load_matrices(done.path)[0][graded[0].name]
    table = model.get_input_embeddings()
    index = torch.tensor([[0, 15, 16], [47, 48, table.num_embeddings - 1]])
    assert torch.allclose(table(index), matrix.decode()[index], atol=1e-6)
    ids = torch.tensor([[1, 40, 63, 7]])
    with torch.no_grad():
        before = model(ids)[0]
    rbe.save(model, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(rbe.load(tmp_path / "again")(ids)[0], before)
    convert.decompress(done.path, tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert torch.allclose(dense(ids)[0], before, atol=1e-3)
        assert torch.allclose(decompress_(model)(ids)[0], before, atol=1e-3)


def test_encode_while_loading(bert: Path) -> None:
    import rbe.hf as hf

    config = hf.RbeConfig(effort="fast", rates=RATES | {}, include=["*word_embeddings"])
    config.rates.pop("*wte")
    model = transformers.AutoModel.from_pretrained(bert, quantization_config=config)
    assert model.get_input_embeddings().spec.grades[0] == (16, 3.0)
    live = transformers.AutoModel.from_pretrained(bert).eval()
    compress_(live, effort="fast", rates=_rates(bert), include=["*word_embeddings"])
    assert torch.equal(live.get_input_embeddings().seeds, model.get_input_embeddings().seeds)


def test_a_flipped_bit_is_found(bert: Path, tmp_path: Path) -> None:
    done = convert.compress(bert, tmp_path / "seeds", effort="fast", rates=_rates(bert), fingerprint=lambda _: {})
    file = next(done.path.glob("*.safetensors"))
    good = file.read_bytes()
    start = good.index(b"word_embeddings.seeds")
    assert start > 0
    for where in (len(good) - 1, len(good) // 2):
        file.write_bytes(good[:where] + bytes([good[where] ^ 4]) + good[where + 1 :])
        with pytest.raises(RbeError):
            checkpoint.load_matrices(done.path)
    file.write_bytes(good)
    config = json.loads((done.path / "config.json").read_text())
    name = next(n for n in config["quantization_config"]["modules"] if "word_embeddings" in n)
    config["quantization_config"]["modules"][name]["spec"]["grades"][0][0] = 32
    (done.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RbeError):
        checkpoint.load_matrices(done.path)


def _bert(vocabulary: int = 256) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    return transformers.BertModel(config).eval()


def test_allocation_grades_the_table_of_tokens_alone() -> None:
    model = _bert()
    plan = compress_(model, bits=0.9, effort="fast", allocate="random")
    specs = {e.module: e.spec for e in plan.seeded}
    grades = specs["embeddings.word_embeddings"].grades
    assert len(grades) > 1 and grades[0][1] > grades[-1][1] >= 1.0
    assert not any(spec.grades for name, spec in specs.items() if name != "embeddings.word_embeddings")
    even = compress_(_bert(), bits=1.6, effort="fast", allocate="random", embeddings_bits=1.5)
    assert not any(e.spec.grades for e in even.seeded)


def test_allocation_in_a_folder(bert: Path, tmp_path: Path) -> None:
    done = convert.compress(bert, tmp_path / "seeds", bits=1.6, effort="fast", allocate="random")
    again = convert.compress(bert, tmp_path / "again", bits=1.6, effort="fast", allocate="random")
    assert done.plan == again.plan and any(e.spec.grades for e in done.plan.seeded)
    assert rbe.load(done.path) is not None


def test_bytes_of_grades_are_within_the_budget() -> None:
    plan = make_plan({"emb.weight": ((400, 64), "F32"), "a.weight": ((128, 64), "F32")}, bits=2)
    rows = torch.linspace(2, 0, 400, dtype=torch.float64) ** 4
    found = budget.allocate_bits(plan, {"emb.weight": rows, "a.weight": torch.tensor(9.0)}, 1.7, graded=["emb.weight"])
    assert isinstance(found["emb"], tuple)
    rates = [bits for _, bits in found["emb"]]
    assert rates == sorted(rates, reverse=True) and found["emb"][-1][0] == 400
    spread = make_plan({"emb.weight": ((400, 64), "F32"), "a.weight": ((128, 64), "F32")}, rates=found)
    # 1.7 bits of 528 x 64 weights, and scales.
    assert 0.95 < (spread.nbytes - 808) / (1.7 * 528 * 64 / 8) <= 1.0


def test_the_command_line_takes_grades(bert: Path, tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from rbe.cli.app import app

    def run(rate: str) -> tuple[int, str]:
        result = testing.CliRunner().invoke(
            app, ["compress", str(bert), str(tmp_path / "out"), "--effort", "fast", "--rate", rate]
        )
        return result.exit_code, result.stdout + result.stderr

    code, said = run("*word_embeddings=32:x,1")
    assert code and "ROW" not in said and "32:x,1" in said and "PATTERN=BITS" in said
    code, said = run("*word_embeddings=30:3,1")
    assert code and "steps of 16" in said
    code, said = run("*query=32:3,1")
    assert code and "no embedding" in said
    assert not (tmp_path / "out").exists()
    code, said = run("*word_embeddings=32:3,1")
    assert code == 0, said
    assert "(3, 1)" in testing.CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout


def test_no_grade_goes_below_a_bit() -> None:
    plan = make_plan({"emb.weight": ((400, 64), "F32"), "a.weight": ((128, 64), "F32")}, bits=2)
    rows = torch.zeros(400, dtype=torch.float64)
    rows[:16] = 1.0
    found = budget.allocate_bits(plan, {"emb.weight": rows, "a.weight": torch.tensor(9.0)}, 1.5, graded=["emb.weight"])
    assert isinstance(found["emb"], tuple) and min(bits for _, bits in found["emb"]) == 1.0


def test_every_matrix_has_rotations_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    compress_(model, effort="fast")
    assert model[0].spec.rotation != model[1].spec.rotation
