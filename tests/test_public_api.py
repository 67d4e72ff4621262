import ast
import importlib
import re
import types
from pathlib import Path

import pytest

import linnet

PACKAGE = Path(linnet.__file__).parent
PACKAGES = sorted(
    ".".join(["linnet", *file.relative_to(PACKAGE).parts[:-1]])
    for file in PACKAGE.rglob("__init__.py")
)


def test_exports_are_exactly_the_public_names():
    public = {
        name
        for name in dir(linnet)
        if not name.startswith("_") and not isinstance(getattr(linnet, name), types.ModuleType)
    }
    assert public == {name for name in linnet.__all__ if not name.startswith("_")}


@pytest.mark.parametrize("name", PACKAGES)
def test_package_lists_its_exports_in_order(name):
    names = declared_exports(name)
    assert names == sorted(set(names), key=reading_order)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_export_exists(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == declared_exports(name)
    assert [export for export in module.__all__ if not hasattr(module, export)] == []


def declared_exports(name: str) -> list[str]:
    """Return the `__all__` that the package's source spells out."""
    file = PACKAGE.joinpath(*name.split(".")[1:], "__init__.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{file} has no explicit __all__")


def reading_order(name: str) -> tuple[int, list[tuple[int, int | str]]]:
    """Constants, classes, then functions, numbers by value; the order that ruff's RUF022 keeps."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, [
        (0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)
    ]
