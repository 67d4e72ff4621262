"""The shape of the code: who may import whom, and how large a file or a function may grow."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "linnet"

# A module imports only from a lower layer, or from its own folder.
LAYERS = {
    "__main__": 6,
    "cli": 6,
    "rl": 5,
    "eval": 5,
    "serve": 5,
    "train": 4,
    "infer": 4,
    "parallel": 3,
    "data": 3,
    "model": 2,
    "ops": 1,
    "text": 1,
    "envs": 1,
    "config": 0,
    "errors": 0,
    "storage": 0,
}
# Modules of one layer that lie in the root folder, and so are not siblings but neighbors.
NEIGHBORS = [{"config", "errors", "storage"}, {"__main__", "cli"}]
FORBIDDEN = {"ops": "torch.distributed", "model": "torch.distributed", "envs": "torch"}
DRAWERS = {"util", "utils", "helper", "helpers", "misc", "manager", "managers", "common"}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80


def test_imports_follow_the_layers():
    assert list(layer_violations(PACKAGE)) == []


def test_no_module_is_a_drawer():
    assert list(drawers(PACKAGE)) == []


def test_files_are_short():
    assert list(long_files(PACKAGE)) == []


def test_functions_are_short():
    assert list(long_functions(PACKAGE)) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("ops/norm.py", "import linnet.model.config", "ops (layer 1) imports model (layer 2)"),
        ("ops/norm.py", "from linnet.text import chat", "ops (layer 1) imports text (layer 1)"),
        ("ops/deep/a.py", "from ...train import loss", "ops (layer 1) imports train (layer 4)"),
        ("ops/__init__.py", "from ..train import loss", "ops (layer 1) imports train (layer 4)"),
        ("data/a.py", "from linnet import infer", "data (layer 3) imports infer (layer 4)"),
        ("errors.py", "from linnet.ops import norm", "errors (layer 0) imports ops (layer 1)"),
        ("model/a.py", "def f():\n    import linnet.cli", "model (layer 2) imports cli (layer 6)"),
        (
            "text/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from linnet.rl import cispo",
            "text (layer 1) imports rl (layer 5)",
        ),
        (
            "text/a.py",
            "import importlib\nimportlib.import_module('linnet.data.packing')",
            "text (layer 1) imports data (layer 3)",
        ),
        ("train/a.py", "import linnet", "train imports linnet, which is no module"),
        ("train/a.py", "from linnet import load", "train imports linnet.load, which is no"),
        ("tools/a.py", "import linnet.errors", "'tools' has no layer"),
        ("model/a.py", "import linnet.extra", "model imports linnet.extra, which is no module"),
        ("ops/a.py", "import torch.distributed as dist", "ops must not use torch.distributed"),
        ("ops/a.py", "from torch import distributed", "ops must not use torch.distributed"),
        ("ops/a.py", "from torch.distributed import nn", "ops must not use torch.distributed"),
        ("ops/a.py", "import torch\ntorch.distributed.init()", "ops must not use torch.distr"),
        ("envs/a.py", "def f():\n    import torch", "envs must not use torch"),
    ],
)
def test_planted_import_is_caught(tmp_path, path, source, complaint):
    plant(tmp_path, path, source)
    (found,) = layer_violations(tmp_path / "linnet")
    assert complaint in found and path in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "def load():\n    from linnet.model import weights"),
        ("cli.py", "from linnet import __version__\nimport linnet.serve.app"),
        ("config.py", "from linnet.errors import ConfigError"),
        ("ops/a/b.py", "from linnet.ops.norm import rms_norm\nfrom .. import norm\nimport torch"),
        ("ops/a/__init__.py", "from .b import c\nfrom ..norm import d"),
        ("train/a.py", "import torch.distributed\nfrom linnet.train import loss"),
        ("envs/a.py", "import math, torchvision_is_something_else"),
    ],
)
def test_allowed_imports_pass(tmp_path, path, source):
    plant(tmp_path, path, source)
    assert list(layer_violations(tmp_path / "linnet")) == []


def test_planted_drawer_is_caught(tmp_path):
    plant(tmp_path, "ops/utils.py", "")
    plant(tmp_path, "misc/norm.py", "")
    assert sorted(drawers(tmp_path / "linnet")) == ["misc/norm.py", "ops/utils.py"]


def test_planted_long_file_is_caught(tmp_path):
    plant(tmp_path, "ops/a.py", "x = 1\n" * 600)
    plant(tmp_path, "ops/b.py", "x = 1\n" * 601)
    assert list(long_files(tmp_path / "linnet")) == ["ops/b.py has 601 lines"]


def test_planted_long_function_is_caught_unless_it_is_a_kernel(tmp_path):
    body = "    x = 1\n" * 80
    plant(tmp_path, "ops/a.py", "def f():\n" + body + "@triton.jit\ndef kernel():\n" + body)
    assert list(long_functions(tmp_path / "linnet")) == ["ops/a.py f has 81 lines"]


def plant(root: Path, path: str, source: str) -> None:
    file = root / "linnet" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


def layer_violations(package: Path) -> Iterator[str]:
    """Yield one line for each import that goes up or sideways, or is forbidden to its folder."""
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        owner = path.parts[0].removesuffix(".py")
        if owner == "__init__":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if owner not in LAYERS:
            yield f"{path}: {owner!r} has no layer; add it to LAYERS"
            continue
        found = [complaint for name in imports(tree, path) if (complaint := judge(owner, name))]
        if owner in FORBIDDEN and uses(tree, path, FORBIDDEN[owner]):
            found.append(f"{owner} must not use {FORBIDDEN[owner]}")
        yield from (f"{path}: {complaint}" for complaint in found)


def judge(owner: str, name: str) -> str:
    """Return why a module of `owner` must not import `name`; empty when it may."""
    package, _, rest = name.partition(".")
    target = rest.split(".")[0]
    if package != "linnet" or target in (owner, "__version__"):
        return ""
    # The root package re-exports from every layer, so importing a name from it imports upwards.
    if target not in LAYERS:
        return f"{owner} imports {name}, which is no module of a layer"
    if LAYERS[target] < LAYERS[owner] or any({owner, target} <= group for group in NEIGHBORS):
        return ""
    return f"{owner} (layer {LAYERS[owner]}) imports {target} (layer {LAYERS[target]})"


def imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that `tree` imports, wherever the import stands."""
    folder = ["linnet", *path.parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            module = [*above, *([node.module] if node.module else [])]
            # Below the root, `from linnet.ops import norm` tells the folder already.
            if module == ["linnet"]:
                yield from (f"linnet.{alias.name}" for alias in node.names)
            else:
                yield ".".join(module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def uses(tree: ast.AST, path: Path, name: str) -> bool:
    """Tell whether `tree` imports `name` or reaches it as an attribute."""
    names = set(imports(tree, path))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return any(f"{used}.".startswith(f"{name}.") for used in names)


def drawers(package: Path) -> Iterator[str]:
    for file in package.rglob("*.py"):
        path = file.relative_to(package)
        if DRAWERS & {part.removesuffix(".py") for part in path.parts}:
            yield str(path)


def long_files(package: Path) -> Iterator[str]:
    for file in sorted(package.rglob("*.py")):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            yield f"{file.relative_to(package)} has {lines} lines"


def long_functions(package: Path) -> Iterator[str]:
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            is_kernel = any("triton" in ast.unparse(mark) for mark in node.decorator_list)
            if lines > MAX_FUNCTION_LINES and not is_kernel:
                yield f"{file.relative_to(package)} {node.name} has {lines} lines"
