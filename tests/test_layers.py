"""Imports go one way only: the order of the layers, no cycle, and nobody but the command line reaches for a leaf."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

LAYERS = ["errors", "shards", "mixing", "disk", "rotation", "formats", "kernels", "outliers", "matrix"]
LAYERS += ["search", "nn", "optim", "metrics", "calibrate", "sensitivity", "stability", "allocate", "budget", "source"]
LAYERS += ["checkpoint", "compress", "convert", "profile", "evaluate", "sampling", "fingerprint", "train"]
LEAVES = ["hf", "report", "model", "cli"]
# Who may reach for a leaf, and only inside a function: the command line, and the whole-model verbs for the plug-in.
MAY_USE_LEAVES = {"cli": set(LEAVES), "model": {"hf"}}
# Runs a leaf, and nobody imports it.
START = "__main__"
# A light leaf, which the command line may load when it starts.
LIGHT = {"report"}
# The extension, and the one thing of the face that costs nothing.
NOT_LAYERS = {"rbe._cpu", "rbe.__version__"}


def modules_of(source: Path) -> dict[str, ast.Module]:
    """Dotted name to syntax tree of every module below `source`; a package is its `__init__`."""
    found = {}
    for path in sorted((source / "rbe").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(name: str, trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, bool]]:
    """(module of ours, whether at module level) for every import; blocks for type checkers do not count."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                names = (alias.name for alias in child.names)
                yield from ((name, top) for name in names if name.split(".")[0] == "rbe" and name not in NOT_LAYERS)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: imports are absolute here"
                if (child.module or "").split(".")[0] == "rbe" and child.module not in NOT_LAYERS:
                    for alias in child.names:
                        full = f"{child.module}.{alias.name}"
                        if full not in NOT_LAYERS:
                            yield (full if full in trees else str(child.module)), top
            else:
                yield from walk(
                    child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                )

    return walk(trees[name], True)


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def complaints(trees: Mapping[str, ast.Module]) -> list[str]:
    """Everything that breaks the rules, one sentence each."""
    wrong = []
    edges: dict[str, set[str]] = {name: set() for name in trees}
    for name in trees:
        own = layer(name)
        if own == START:
            edges[name].update(target for target, _ in imports(name, trees))
            continue
        if own and own not in LAYERS and own not in LEAVES:
            wrong.append(f"{name} has no place in the order of the layers")
            continue
        for target, top in imports(name, trees):
            other = layer(target)
            if top:
                edges[name].add(target)
            if other == START:
                wrong.append(f"{name} imports what starts the command line")
            elif other == "":
                wrong.append(f"{name} imports the face")
            elif other == own and own not in LEAVES:
                continue
            elif other in LEAVES and other != own:
                if (top and not (own == "cli" and other in LIGHT)) or other not in MAY_USE_LEAVES.get(own, set()):
                    wrong.append(f"{name} imports the leaf {target}")
            elif top and own in LAYERS and (other not in LAYERS or LAYERS.index(other) > LAYERS.index(own)):
                wrong.append(f"{name} imports {target}, which stands above it")
    return wrong + [f"cycle: {' -> '.join(path)}" for path in cycles(edges)]


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """One path for every import that leads back to a module still being imported."""
    done: set[str] = set()
    found = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name in done or name not in edges:
            return
        for target in sorted(edges[name]):
            visit(target, [*path, name])
        done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def test_imports_go_one_way() -> None:
    assert complaints(modules_of(SOURCE)) == []


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ({"rbe.matrix": "import rbe.search"}, "stands above"),
        ({"rbe.formats": "from rbe.formats import spec", "rbe.formats.spec": "import rbe.formats"}, "cycle"),
        ({"rbe.convert": "def f():\n    import rbe.hf"}, "leaf"),
        ({"rbe.cli": "import rbe.hf"}, "leaf"),
        ({"rbe.nn": "from rbe import encode"}, "face"),
        ({"rbe.helpers": ""}, "no place"),
        ({"rbe.cli": "def f():\n    import rbe.hf", "rbe.nn": "def f():\n    import rbe.search"}, None),
        ({"rbe.nn": "if TYPE_CHECKING:\n    import rbe.convert\nfrom rbe.formats import get"}, None),
    ],
)
def test_the_rules_notice(sources: dict[str, str], complaint: str | None) -> None:
    trees = {name: ast.parse(text) for name, text in {"rbe": "", "rbe.formats": "", **sources}.items()}
    found = complaints(trees)
    assert (found == []) if complaint is None else any(complaint in text for text in found)
