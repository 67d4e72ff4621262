"""Which files of a folder are left out: `.gitignore` files, as git applies them, and defaults.

A folder that is left out is not entered, so that nothing in it can be taken back: that, too, is
git's rule. `pathspec` reads the patterns. How they are applied is ours: it judges a path by its
parents as well, so that `!docs` would take back all that lies within.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

FILE_NAME = ".gitignore"
MAX_RULE_BYTES = 1 << 16
"""Of one file of rules; what lies beyond is not applied."""

MAX_WILDCARDS = 3
"""In one rule: the time to match grows with the length of a path to this power."""

VERSION_CONTROL = frozenset({".git", ".hg", ".jj", ".svn"})
"""Never entered."""

DEFAULTS = (
    # What other programs make.
    "node_modules/",
    "__pycache__/",
    "site-packages/",
    ".venv/",
    ".tox/",
    ".nox/",
    ".*_cache/",
    ".eggs/",
    "*.egg-info/",
    ".ipynb_checkpoints/",
    ".DS_Store",
    "*.min.js",
    "*.min.css",
    "*.map",
    "package-lock.json",
    "npm-shrinkwrap.json",
    "pnpm-lock.yaml",
    "yarn.lock",
    "poetry.lock",
    "uv.lock",
    "Pipfile.lock",
    "Cargo.lock",
    "Gemfile.lock",
    "composer.lock",
    "go.sum",
    # What may hold secrets.
    ".env",
    ".env.*",
    "!.env.example",
    "!.env.sample",
    "!.env.template",
    "*.pem",
    "*.key",
    "*.p12",
    "id_rsa",
    "id_ed25519",
    ".netrc",
    ".npmrc",
    ".pypirc",
)
"""Rules that hold in every folder, whatever its `.gitignore` says."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The rules of one file, for the paths below its folder."""

    folder: str
    patterns: Sequence[GitIgnoreSpecPattern]
    reason: str

    def verdict(self, path: str) -> bool | None:
        """Return whether a path is left out, None if no rule speaks of it."""
        below = path[len(self.folder) + 1 :]
        # The last one that matches decides.
        for pattern in reversed(self.patterns):
            if pattern.regex is not None and _matches(pattern.regex, below):
                return pattern.include
        return None


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """The rules that hold within one folder.

    Paths are absolute, with `/`; those of folders end with it.
    """

    fixed: tuple[_Layer, ...]
    """Which no `.gitignore` can take back."""
    layers: tuple[_Layer, ...] = field(default=())
    """From `.gitignore` files, those of deeper folders last; the last one that speaks decides."""

    @classmethod
    def of(cls, folder: Path, exclude: Sequence[str], use_defaults: bool) -> Self:
        """Return the rules above a folder, without those of its own `.gitignore`.

        Args:
            folder: resolved.
            exclude: further patterns, relative to it.
            use_defaults: whether `DEFAULTS` and the rules of the repository around it hold.
        """
        root = folder.as_posix().rstrip("/")
        fixed = [_Layer(root, compile_rules(exclude), "excluded")]
        if not use_defaults:
            return cls(tuple(fixed))
        fixed.append(_Layer(root, compile_rules(DEFAULTS), "left out by default"))
        around = cls((), _layers_around(folder))
        # Who names a folder that is ignored means what is in it.
        is_ignored = around.reason(f"{root}/") is not None
        return cls(tuple(fixed), () if is_ignored else around.layers)

    def within(self, folder: Path) -> Self:
        """Return the rules within a folder: these, and its own."""
        layer = _read_layer(folder, folder / FILE_NAME, f"ignored by {FILE_NAME}")
        return type(self)(self.fixed, (*self.layers, layer)) if layer else self

    def reason(self, path: str) -> str | None:
        """Return why a path is left out; None if it is not."""
        for layer in self.fixed:
            if layer.verdict(path):
                return layer.reason
        for layer in reversed(self.layers):
            verdict = layer.verdict(path)
            if verdict is not None:
                return layer.reason if verdict else None
        return None


def compile_rules(lines: Iterable[str]) -> list[GitIgnoreSpecPattern]:
    """Compile gitignore patterns; those that are none match nothing, as in git."""
    patterns = []
    for line in lines:
        if len(re.findall(r"\*+", line)) > MAX_WILDCARDS:
            _log.warning("the rule %r has over %d wildcards; not applied", line, MAX_WILDCARDS)
            continue
        # `a/**/` means the folders within `a`, which only this spelling says to `pathspec`.
        spelled = re.sub(r"/\*\*/ *$", "/**/*/", line)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `re` has opinions on some classes of characters
                patterns.append(GitIgnoreSpecPattern(spelled))
        except (ValueError, re.error):
            continue
    return patterns


def _matches(regex: re.Pattern[str], path: str) -> bool:
    """Return whether a pattern is about a path itself, not about a folder that it lies in."""
    is_of_names = "ps_d" in regex.groupindex  # the `/` after the name of a folder
    if not regex.pattern.startswith("^"):  # `**` is everything, `*/` is every folder
        return path.endswith("/") or not is_of_names
    if is_of_names:
        return regex.fullmatch(path) is not None
    # Of what lies within a folder, as `a/**`, which is not the folder itself.
    found = regex.match(path)
    return found is not None and found.end() < len(path)


def _layers_around(folder: Path) -> tuple[_Layer, ...]:
    """Return the rules that the git repository around a folder has above it, the highest first."""
    parents = list(folder.parents)
    tops = [n for n, parent in enumerate([folder, *parents]) if (parent / ".git").exists()]
    if not tops:
        return ()
    top = [folder, *parents][tops[0]]
    found = [_read_layer(top, top / ".git" / "info" / "exclude", "ignored by .git/info/exclude")]
    found += [
        _read_layer(parent, parent / FILE_NAME, f"ignored by {FILE_NAME}")
        for parent in reversed(parents[: tops[0]])
    ]
    return tuple(layer for layer in found if layer is not None)


def _read_layer(folder: Path, file: Path, reason: str) -> _Layer | None:
    try:
        if file.is_symlink() or not file.is_file():
            return None
        with file.open("rb") as opened:
            content = opened.read(MAX_RULE_BYTES)
    except OSError:
        return None
    # As in git: not `splitlines`, which cuts at more than line feeds.
    text = content.decode("utf-8-sig", errors="surrogateescape")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return _Layer(folder.as_posix().rstrip("/"), compile_rules(lines), reason)
