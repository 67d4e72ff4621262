"""The prompt of `linnet ask`: what of a folder is in it, how long it is, and what is not."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from rich.console import Console
from rich.table import Table

from linnet.cli.screen import printable
from linnet.model.presets import config_of, model_folder
from linnet.text import Tokenizer, chat_template_of
from linnet.text.folder import SkippedFile, frame_documents, pack_folder

NUM_NAMED = 3
"""Files that a summary names; `--list` shows all."""


@dataclass(frozen=True, slots=True)
class FileTokens:
    """A file of the prompt."""

    path: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class FolderPrompt:
    """A question about a folder."""

    tokens: tuple[int, ...]
    num_shared: int
    """Tokens that are the same whatever the question: all up to the end of the last file."""
    files: tuple[FileTokens, ...]
    """In the order of the prompt."""
    skipped: tuple[SkippedFile, ...]

    @property
    def num_file_tokens(self) -> int:
        """Tokens of all files."""
        return sum(file.num_tokens for file in self.files)

    @property
    def largest(self) -> str:
        """The files with the most tokens, in words."""
        ordered = sorted(self.files, key=lambda file: -file.num_tokens)[:NUM_NAMED]
        return ", ".join(f"{file.path} ({file.num_tokens:,})" for file in ordered)


def read_prompt(args: argparse.Namespace, question: str) -> FolderPrompt:
    """Pack the folder that the command line names, and encode it with the tokenizer of its model.

    Raises:
        CheckpointError, ConfigError: there is no such model, or it knows no chat format.
        DataError: the folder cannot be packed, or there is no tokenizer.
    """
    config_of(args.model)
    tokenizer = Tokenizer.load(model_folder(args.model))
    before, after = frame_documents(tokenizer, question, chat_template_of(tokenizer))
    packed = pack_folder(
        args.path,
        include=args.include,
        exclude=args.exclude,
        use_ignore_rules=not args.no_ignore,
        order=args.order,
        max_file_bytes=args.max_file_kib << 10,
    )
    encoded = tokenizer.encode_batch([file.text for file in packed.files])
    shared = [*before, *chain.from_iterable(encoded)]
    return FolderPrompt(
        tokens=(*shared, *after),
        num_shared=len(shared),
        files=tuple(
            FileTokens(file.path, len(ids)) for file, ids in zip(packed.files, encoded, strict=True)
        ),
        skipped=packed.skipped,
    )


def describe(prompt: FolderPrompt, console: Console) -> None:
    """Tell in a few lines what is packed and what is not."""
    lines = [
        f"packed    {len(prompt.files):,} files, {prompt.num_file_tokens:,} tokens",
        f"largest   {prompt.largest}",
    ]
    lines += [
        f"left out  {len(paths):,} {reason}: {_some(paths)}"
        for reason, paths in _by_reason(prompt.skipped)
    ]
    for line in lines:
        _print(console, line)


def list_files(prompt: FolderPrompt, console: Console) -> None:
    """Print every file of the prompt with its tokens, and all that is left out with the reason."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("file", overflow="fold")
    for file in prompt.files:
        table.add_row(f"{file.num_tokens:,}", printable(file.path))
    for skipped in prompt.skipped:
        table.add_row("-", printable(f"{skipped.path}  ({skipped.reason})"), style="dim")
    console.print(table, markup=False)
    _print(console, f"{len(prompt.files):,} files, {prompt.num_file_tokens:,} tokens")


def _by_reason(skipped: Sequence[SkippedFile]) -> list[tuple[str, list[str]]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for item in skipped:
        groups[item.reason].append(item.path)
    return sorted(groups.items())


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - NUM_NAMED:,} more" if len(paths) > NUM_NAMED else ""
    return ", ".join(paths[:NUM_NAMED]) + more


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
