"""The file of a trained network: what is written is read, and what is damaged or of another network is refused."""

import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import QUICK, STREAM, Write
from torch import Tensor

from rbe.errors import RbeError
from rbe.nn import Stream, pack
from rbe.train import load, load_config, packed, train
from rbe.train.run import WEIGHTS

TENSORS = {
    "a.seed": torch.arange(300, dtype=torch.uint8),
    "a.scale": torch.tensor(0.25),
    "b.seeds": torch.randint(-(2**63), 2**63 - 1, (6, 2)),
    "b.bias": torch.randn(5).half(),
    "c.bias": torch.randn(7),
    "d.codes": torch.arange(-4, 4, dtype=torch.int8),
    "e.empty": torch.empty(0, 3),
    "f.turned": torch.randn(4, 3).T,
    "g.half": torch.randn(2, 2).bfloat16(),
}


def like() -> dict[str, Tensor]:
    """Of a stream the length is not known, of c the dtype is another."""
    return {name: torch.zeros_like(t) for name, t in TENSORS.items()} | {
        "a.seed": torch.empty(0, dtype=torch.uint8),
        "c.bias": torch.zeros(7).half(),
    }


def test_what_is_written_is_read() -> None:
    data = packed.write(TENSORS, like())
    again = packed.read(data, like())
    assert list(again) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    # Magic and checksum; one exception of two bytes; the length of the stream is 300.
    assert len(data) == 8 + (1 + 2) + 2 + sum(t.nbytes for t in TENSORS.values())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"c.bias": torch.zeros(8)}, r"c.bias is \(7,\) in the trained network and \(8,\)"),
        ({"z": torch.zeros(1)}, r"other tensors than the trained one \(z\)"),
    ],
)
def test_what_no_fresh_network_could_read_is_not_written(change: dict[str, Tensor], complaint: str) -> None:
    with pytest.raises(RbeError, match=complaint):
        packed.write(TENSORS, like() | change)
    with pytest.raises(RbeError, match="complex64, which the file"):
        packed.write(TENSORS | {"c.bias": torch.zeros(7, dtype=torch.complex64)}, like())


def test_a_number_without_an_end_is_refused() -> None:
    body = b"\xff" * 12
    with pytest.raises(ValueError, match="has no end"):
        packed.read(packed.MAGIC + zlib.crc32(body).to_bytes(4, "little") + body, like())


def test_damage_is_refused() -> None:
    data = packed.write(TENSORS, like())
    for k in range(0, len(data), 7):
        with pytest.raises(ValueError, match=r"begins with|was changed"):
            packed.read(data[:k] + bytes([data[k] ^ 4]) + data[k + 1 :], like())
        with pytest.raises(ValueError, match=r"begins with|was changed"):
            packed.read(data[:k], like())


def test_another_network_is_refused() -> None:
    data = packed.write(TENSORS, like())
    with pytest.raises(ValueError, match="no place for"):
        packed.read(data, {name: t for name, t in like().items() if name != "d.codes"})
    with pytest.raises(ValueError, match="bytes too soon"):
        packed.read(data, like() | {"z.bias": torch.zeros(9)})


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("text", [QUICK, STREAM], ids=["blocks", "streams"])
def test_the_file_holds_the_bytes_that_are_counted(write: Write, tmp_path: Path, text: str, bits: int) -> None:
    out = tmp_path / "out"
    config = load_config(write(text + f"rest_bits = {bits}\n"))
    result = train(config, out)
    model = load(out)
    streams = sum(isinstance(module, Stream) for module in model.modules())
    size = (out / WEIGHTS).stat().st_size
    assert size == result.file_bytes == result.bytes + 9 + streams
    # Runs of before had torch's own file.
    torch.save(pack(model, bits), out / "model.pt")
    (out / WEIGHTS).unlink()
    again = load(out).state_dict()
    assert all(torch.equal(t, again[name]) for name, t in model.state_dict().items())
    (out / "model.pt").unlink()
    with pytest.raises(RbeError, match="no finished run"):
        load(out)
    # A result without its network is trained anew.
    assert replace(train(config, out), seconds=0) == replace(result, seconds=0)
    assert load(out).state_dict().keys() == again.keys()
