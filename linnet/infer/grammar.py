"""Structured output: completions that match a JSON schema or a regular expression.

The work is done by llguidance: it has no dependencies, reads a tokenizer as a list of byte strings,
computes a mask in microseconds from a lazily built lexer, and limits what a token may cost. What it
does not limit is every way to compile a grammar, so each new one is first tried in a process that
can be stopped (`grammar_check`).
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from linnet.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE_BYTES = 256 * 1024
MAX_COMPILED = 64
CHECK_TIMEOUT_S = 5.0
"""For the process that tries a grammar, should the machine be too busy for its second of work."""

_JSON_OPTIONS: "JsonCompileOptions" = {
    # One space, or a line end and its indentation: a model must not go on with blanks forever.
    "whitespace_pattern": r" |\n[ \t]{0,64}",
    # What a schema asks for is kept or refused, whatever options it sets itself.
    "lenient": False,
    "coerce_one_of": False,
}
_UNKNOWN = "\ufffd".encode()


class GrammarError(ValueError):
    """A grammar that is invalid, matches nothing, or costs too much."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a completion must match; made by `json_schema`, `json_object` or `regex`.

    Raises:
        GrammarError: the source is too long, or no valid text.
    """

    kind: Literal["json_schema", "regex"]
    source: str

    def __post_init__(self) -> None:
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError:
            raise GrammarError(f"the {self._name} has a surrogate that is no character") from None
        if size > MAX_SOURCE_BYTES:
            raise GrammarError(
                f"the {self._name} has {size} bytes; at most {MAX_SOURCE_BYTES} are allowed"
            )

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Self:  # Any: JSON
        """Match the JSON documents that a JSON schema describes.

        Raises:
            GrammarError: `schema` is not JSON, or too long. A keyword that cannot be kept is
                refused where the grammar is compiled.
        """
        try:
            source = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the JSON schema is not JSON: {error}") from None
        return cls("json_schema", source)

    @classmethod
    def json_object(cls) -> Self:
        """Match any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Match a regular expression from the first character to the last (Rust's syntax)."""
        return cls("regex", pattern)

    @property
    def _name(self) -> str:
        return "regex" if self.kind == "regex" else "JSON schema"

    def compiled_source(self) -> str:
        """Return what llguidance reads.

        Raises:
            GrammarError: the schema is not JSON.
        """
        from llguidance import LLMatcher

        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.source)
        try:
            return LLMatcher.grammar_from_json_schema(self.source, overrides=_JSON_OPTIONS)
        except ValueError as error:
            raise GrammarError(f"the JSON schema is not JSON: {_one_line(str(error))}") from None

    def refusal(self, reason: str) -> GrammarError:
        """Return an error that names what kind of grammar this is, in one line."""
        return GrammarError(f"the {self._name} cannot be used: {_one_line(reason)}")


class GrammarMatcher:
    """Where one completion stands in its grammar."""

    def __init__(self, grammar: Grammar, matcher: "LLMatcher", vocab_size: int) -> None:
        self._grammar, self._matcher, self._vocab_size = grammar, matcher, vocab_size

    def copy(self) -> "GrammarMatcher":
        """Return one that goes on by itself."""
        return GrammarMatcher(self._grammar, self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> NDArray[np.bool_]:
        """Return for each of [vocab] whether it may come next; end ids where the text may end.

        Raises:
            GrammarError: the limits of work or memory are reached, or nothing may come next.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def push(self, token: int) -> None:
        """Go on by one allowed token.

        Raises:
            GrammarError: the limits of work or memory are reached.
        """
        self._matcher.consume_token(token)
        self._check()

    def reset(self) -> None:
        """Go back to the start."""
        self._matcher.reset()

    @property
    def is_complete(self) -> bool:
        """Whether the text matches and nothing more can be added to it."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error() or (
            self._matcher.is_stopped() and not self._matcher.is_accepting()
        ):
            raise self._grammar.refusal(self._matcher.get_error() or "NoExtension")


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and remembers the last ones, refused ones as well."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        """Keep what is needed; the first grammar costs a pass over the vocabulary.

        Args:
            tokenizer: gives the bytes of the tokens; its special tokens match no text.
            vocab_size: length of a row of logits.
            end_ids: tokens that end a text, at least one.
        """
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, sorted(end_ids)
        self._compiled: OrderedDict[Grammar, GrammarMatcher | GrammarError] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the start of the grammar; may be called from any thread.

        Raises:
            GrammarError: the grammar is invalid, matches nothing, or takes more than a second or
                2 GiB to compile.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
        if known is None:
            try:
                known = self._compile(grammar)
            except GrammarError as error:
                known = error
            with self._lock:
                self._compiled[grammar] = known
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        if isinstance(known, GrammarError):
            raise GrammarError(*known.args)
        return known.copy()

    def _compile(self, grammar: Grammar) -> GrammarMatcher:
        from llguidance import LLMatcher

        from linnet.infer.grammar_check import parser_limits

        source = grammar.compiled_source()
        if reason := _reason_against(source):
            raise grammar.refusal(reason)
        matcher = LLMatcher(self._backend, source, log_level=0, limits=parser_limits())
        compiled = GrammarMatcher(grammar, matcher, self._vocab_size)
        compiled.copy().allowed()  # a grammar that nothing matches shows it here
        return compiled

    @cached_property
    def _backend(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        view = _TokenizerView(self._tokenizer, self._vocab_size, self._end_ids[0])
        return LLTokenizer(TokenizerWrapper(view), eos_token=self._end_ids)


class _TokenizerView:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_id
        pieces = (tokenizer.token_bytes(token, skip_special=False) for token in range(vocab_size))
        # Ids without a token decode to U+FFFD; an empty token is never allowed.
        self.tokens = [b"" if piece == _UNKNOWN else piece for piece in pieces]
        self.special_token_ids = sorted(tokenizer.special_ids.values())

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"))


def _reason_against(source: str) -> str:
    """Return why a grammar cannot be compiled; empty if it can."""
    import llguidance

    from linnet.infer import grammar_check

    too_much = f"compiling it takes more than {grammar_check.CPU_SECONDS} s or 2 GiB of memory"
    site = str(Path(llguidance.__file__).parents[1])
    try:
        process = subprocess.run(
            # -P, -S: nothing of linnet and no other package is searched for or started.
            [sys.executable, "-P", "-S", grammar_check.__file__],
            env={**os.environ, "PYTHONPATH": site},
            input=source.encode(),
            capture_output=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return too_much
    if process.returncode < 0:  # killed by the system, at a limit or after a crash
        return too_much
    if process.returncode > 0:
        last_line = process.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return f"compiling it fails: {last_line}"
    return process.stdout.decode(errors="replace")


def _one_line(reason: str) -> str:
    """Return the point of an error: the first line, or what a quoted regex does wrong."""
    syntax = re.search(r"^\s*error: (.*)$", reason, re.MULTILINE)
    text = syntax.group(1) if syntax else reason.strip().partition("\n")[0]
    if text.startswith("NoExtension"):
        return "nothing can match it"
    return text if len(text) <= 300 else text[:300] + "..."
