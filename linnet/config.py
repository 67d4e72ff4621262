"""Recipes: TOML files and `--set a.b=c` overrides turned into frozen dataclasses.

Every section of a recipe is a frozen, keyword-only dataclass that lives beside the code it
configures. This module only knows how to fill one from a mapping, strictly: an unknown key is an
error that names the nearest valid one, a value of the wrong type is an error that names the key.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from linnet.errors import ConfigError

Section = TypeVar("Section")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest valid name, or list the valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(names)}"


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML recipe.

    Raises:
        ConfigError: the file is missing, cannot be read or is not valid TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"recipe {str(path)!r} is not a file; pass the path of a .toml") from None
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid TOML: {error}") from None


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `mapping` with `a.b=c` assignments applied.

    A value is read as TOML where it is valid TOML (`1`, `true`, `[1, 2]`), else as text.

    Raises:
        ConfigError: an override is not of the form `path=value`, or its path runs through a value.
    """
    result = _copy(mapping)
    for override in overrides:
        path, equals, text = override.partition("=")
        *parents, key = names = [name.strip() for name in path.split(".")]
        if not equals or not all(names):
            raise ConfigError(f"--set {override!r} is not of the form path=value")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section")
        table[key] = _parse_value(text.strip())
    return result


def build(cls: type[Section], mapping: Mapping[str, Any], where: str = "") -> Section:
    """Fill the dataclass `cls` from `mapping`, checking names and types.

    Args:
        cls: a dataclass; fields that are dataclasses themselves are filled from nested mappings.
        mapping: the values, usually one table of a TOML file.
        where: the dotted path of this table, for error messages.

    Raises:
        ConfigError: an unknown key, a missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"unknown key {prefix + key!r}{nearest(key, fields)}")
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in mapping:
            raise ConfigError(f"missing key {prefix + name!r}")
    values = {key: _coerce(value, hints[key], prefix + key) for key, value in mapping.items()}
    return cls(**values)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as `hint`, widening int to float and list to tuple, or raise ConfigError."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where!r} is a section; got {value!r}")
        return build(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args, where)
    if origin is Literal:
        # True == 1 == 1.0, but they are not the same choice.
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        hint_text = nearest(str(value), map(str, args))
        raise ConfigError(f"{where!r} is {value!r}{hint_text}")
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(value) != len(hints):
            raise ConfigError(f"{where!r} has {len(value)} items; expected {len(hints)}")
        return tuple(_coerce(item, each, where) for item, each in zip(value, hints, strict=True))
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool) == (type(value) is bool)
    ):
        return value
    raise ConfigError(f"{where!r} is {value!r}; expected {_describe(hint)}")


def _coerce_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    choices = [option for option in options if option is not type(None)]
    for option in choices[:-1]:
        try:
            return _coerce(value, option, where)
        except ConfigError:
            continue
    return _coerce(value, choices[-1], where)


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A text of several lines may read as further TOML keys; then it is a text.
    return parsed["value"] if len(parsed) == 1 else text


def _copy(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy(item) if isinstance(item, Mapping) else item for key, item in mapping.items()
    }
