"""The face: the names that others build on, loaded only when they are used."""

import subprocess
import sys

import pytest

import rbe

HEAVY = ("transformers", "matplotlib", "triton", "joblib", "typer", "scipy", "huggingface_hub", "accelerate")


def loaded_by(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    assert loaded_by("import rbe") & {*HEAVY, "torch", "numpy"} == set()


def test_using_every_name_loads_nothing_heavy_but_torch() -> None:
    # torch itself may look for numpy and the like; ours must not load what only the leaves need.
    assert loaded_by("import rbe\nfor name in rbe.__all__: getattr(rbe, name)") & set(HEAVY) == set()


@pytest.mark.parametrize("name", rbe.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(rbe, name) is getattr(rbe, name)
    assert name in dir(rbe)


def test_the_layers_are_there() -> None:
    assert rbe.nn.Linear is not None
    assert rbe.SeedMatrix.from_seeds is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        rbe.decode  # noqa: B018
