import json

import pytest
import torch

from rbe.allocate import Entry, Plan, make_plan, seed_bytes
from rbe.errors import RbeError
from rbe.formats import SeedSpec
from rbe.nn import swap
from rbe.search import encode

BARE = {
    "layers.0.attn.query.weight": ((64, 96), "F32"),
    "layers.0.attn.query.bias": ((64,), "F32"),
    "layers.0.norm.weight": ((96,), "F32"),
    "layers.0.conv.weight": ((8, 8, 3, 3), "F32"),
    "tok_embeddings.weight": ((100, 48), "F16"),
    "wpe.weight": ((32, 48), "F32"),
    "position_ids": ((1, 512), "I64"),
    "table.weight": ((64, 64), "I32"),
    "head.weight": ((2, 64), "F32"),
    "nothing.weight": ((0, 64), "F32"),
    "row.weight": ((1, 640), "F32"),
    "column.weight": ((640, 1), "F32"),
    "raw": ((64, 64), "F32"),
}


def entries(plan):
    return {entry.name: entry for entry in plan}


def test_names_decide_where_nothing_else_is_known():
    plan = entries(make_plan(BARE))
    assert [n for n, e in plan.items() if e.kind == "linear"] == ["layers.0.attn.query.weight"]
    assert [n for n, e in plan.items() if e.kind == "embedding"] == ["tok_embeddings.weight", "wpe.weight"]
    assert plan["tok_embeddings.weight"].row_scale and not plan["layers.0.attn.query.weight"].row_scale


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layers.0.norm.weight", "it is no matrix"),
        ("position_ids", "I64 is not a dtype"),
        ("table.weight", "I32 is not a dtype"),
        ("nothing.weight", "it is empty"),
        ("raw", "not called"),
        ("head.weight", "too thin: seeds would take 260 bytes of 512"),
        ("row.weight", "too thin"),
        ("column.weight", "too thin"),
    ],
)
def test_what_is_kept_has_a_reason(name, reason):
    entry = entries(make_plan(BARE))[name]
    assert entry.kind == "keep" and entry.spec is None and reason in entry.reason
    assert entry.nbytes == entry.source_bytes


def test_the_planned_bytes_are_the_stored_bytes():
    weight = torch.randn(40, 50)
    matrix = encode(weight, bits=1.5, effort="fast", rotate="in", row_scale=True)
    assert seed_bytes(matrix.spec, row_scale=True) == matrix.nbytes
    entry = Entry("a.weight", "embedding", (40, 50), "F32", matrix.spec, row_scale=True)
    assert entry.nbytes == matrix.nbytes


def test_rates_and_patterns():
    plan = entries(make_plan(BARE, bits=3, embeddings_bits=4, window=12))
    assert plan["layers.0.attn.query.weight"].spec == SeedSpec("trellis", (64, 96), 3.0, window=12)
    assert plan["wpe.weight"].spec.bits == 4.0
    kept = entries(make_plan(BARE, embeddings_bits=0))
    assert kept["wpe.weight"].reason == "embeddings are kept" and kept["layers.0.attn.query.weight"].spec
    only = make_plan(BARE, include=["*.query"])
    assert [e.name for e in only.seeded] == ["layers.0.attn.query.weight"]
    assert entries(only)["wpe.weight"].reason == "not included"
    without = make_plan(BARE, exclude=["wpe.weight", "layers.0.*"])
    assert [e.name for e in without.seeded] == ["tok_embeddings.weight"]
    assert entries(without)["wpe.weight"].reason == "excluded"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_fits_nothing_is_an_error_with_close_names(option):
    with pytest.raises(RbeError, match=rf"{option}: 'qurey' fits no tensor; names like it are query.*\*query\*"):
        make_plan(BARE, **{option: ["*.query", "qurey"]})
    with pytest.raises(RbeError, match="there are column"):
        make_plan(BARE, **{option: ["zzzzzz"]})
    with pytest.raises(RbeError, match=r"give a list of patterns, \['a'\]"):
        make_plan(BARE, **{option: "a"})


def test_a_rate_that_is_not_offered_says_which_are():
    with pytest.raises(RbeError, match=r"choose one of 0\.5, 1, 1\.5, 2, 2\.5, 3, 3\.5, 4"):
        make_plan(BARE, bits=5)
    with pytest.raises(RbeError, match="choose one of"):
        make_plan(BARE, embeddings_bits=0.7)


def test_a_known_module_decides_over_its_name():
    modules = {
        "a": swap.Site("a", "linear", (96, 64), transposed=True),
        "b": swap.Site("b", "embedding", (96, 64)),
        "c": swap.Site("c", "keep", (96, 64), reason="odd layer"),
        "d": swap.Site("d", "linear", (96, 64)),
    }
    tensors = {f"{name}.weight": ((64, 96) if name == "a" else (96, 64), "F32") for name in "abce"}
    plan = entries(make_plan({**tensors, "d.weight": ((64, 96), "F32")}, modules))
    assert plan["a.weight"].transposed and plan["a.weight"].spec.shape == (96, 64)
    assert plan["b.weight"].kind == "embedding"
    assert plan["c.weight"].reason == "odd layer"
    assert "this is another shape" in plan["d.weight"].reason
    assert "no layer" in plan["e.weight"].reason


def test_tied_and_ignored_tensors_take_no_bytes():
    plan = make_plan(
        dict.fromkeys(("a.weight", "b.weight", "c.weight"), ((64, 64), "F32")),
        tied={"b.weight": "a.weight"},
        ignored={"c.weight"},
    )
    assert plan.weights == 64 * 64 and plan.nbytes == plan.seeded[0].nbytes and plan.source_bytes == 3 * 4 * 64 * 64
    assert [e.reason for e in plan] == ["", "tied to a.weight", "the architecture ignores it"]


def test_a_plan_survives_json_and_refuses_other_json():
    plan = make_plan(BARE, bits=2.5)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for wrong in ({}, {"entries": [{}]}, {"entries": [{"spec": None, "shape": [1], "colour": 1}]}, {"entries": 3}):
        with pytest.raises(RbeError, match="plan"):
            Plan.from_json(wrong)


def test_the_table_shows_every_tensor_and_reason():
    text = str(make_plan(BARE))
    assert all(name in text for name in BARE)
    assert "trellis 2 bit" in text and "too thin" in text and "64x96" in text


def test_rates_of_patterns_go_before_the_usual_ones() -> None:
    tensors = {f"block.{k}.{n}.weight": ((64, 64), "F32") for k in (0, 1) for n in ("attn", "mlp")}
    tensors["wte.weight"] = ((128, 64), "F32")
    plan = make_plan(tensors, bits=2, embeddings_bits=1.5, rates={"*.attn": 3, "block.1.*": 4, "wte": 1})
    rates = {entry.name: entry.spec.bits for entry in plan.seeded}
    assert rates == {
        "block.0.attn.weight": 3,
        "block.0.mlp.weight": 2,
        "block.1.attn.weight": 4,
        "block.1.mlp.weight": 4,
        "wte.weight": 1,
    }


@pytest.mark.parametrize(
    ("rates", "message"), [({"*.atn": 3}, "rates: .* fits no tensor"), ({"*.attn": 2.2}, "2.2 bits")]
)
def test_rates_that_cannot_be_are_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(RbeError, match=message):
        make_plan({"block.attn.weight": ((64, 64), "F32")}, rates=rates)
