"""Fixtures of the whole suite: where the data is, and tiny models made on the fly."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Two test processes share two cores: more threads than that make every tiny product wait for the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from rbe.kernels import cpu

ROOT = Path(__file__).resolve().parent.parent

# Offline, whatever the machine could reach: a test that needs the network is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEXT = [
    "the cat sat on the mat and looked at the rain",
    "a small boat crossed the wide river before noon",
    "seven bakers sold bread at the market in the rain",
    "the river ran past the old market and the mill",
]


@pytest.fixture(scope="session")
def RBE_DATA() -> Path:
    """The folder with `data/` and `models/`; the test is skipped where it is absent."""
    folder = Path(os.environ.get("RBE_DATA", ROOT.parent / "shared"))
    if folder.name == "data":
        folder = folder.parent
    if not (folder / "data").is_dir():
        pytest.skip(f"no {folder / 'data'}; set RBE_DATA to the folder that holds data/ and models/")
    return folder


def tokenizer() -> object:
    """A word-level tokenizer of the words of TEXT."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "\n", *sorted({w for line in TEXT for w in line.split()})]
    fast = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]")


def _save(model: torch.nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval().save_pretrained(folder)  # type: ignore[operator]
        tokenizer().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT encoder with a tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        architectures=["BertModel"],
    )
    return _save(BertModel(config), tmp_path_factory.mktemp("bert") / "dense")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer GPT-2 language model with a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    return _save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2") / "dense")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Kernels are tested on the instruction tiers that a module names in TIERS."""
    if "tier" in metafunc.fixturenames:
        metafunc.parametrize("tier", metafunc.module.TIERS, indirect=True)


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels on one tier; the test is skipped where the processor lacks it."""
    if not cpu.tier_available(request.param):
        pytest.skip(f"this processor has no {request.param}")
    cpu.set_tier(request.param)
    yield request.param
    cpu.set_tier("")
