"""`linnet ask`: a question about a folder, all of which is the prompt.

The files stand first and the question last, so that every question about the same folder begins
alike. What the engine computes of the files is kept on disk, and the next question starts there,
whichever process asks it. A file that has changed costs itself and what stands after it.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from linnet.cli.options import add_model_options, add_sampling_options, load, sampling_params
from linnet.errors import ConfigError, DataError, MemoryPlanError

if TYPE_CHECKING:
    from rich.console import Console

    from linnet.cli.answering import Answer, Display
    from linnet.cli.folder_prompt import FolderPrompt
    from linnet.cli.screen import PromptBar
    from linnet.infer import Engine, SamplingParams

GIB = 1 << 30
INTERRUPTED = 130
NUM_LAST_FILES = 4
"""Before each of which a prefix is kept, where the last ones are those that change."""


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "ask",
        help="ask about a whole folder",
        description="Ask a question about a repository or a folder of documents: all its text "
        "files become one prompt. What is computed of them is kept on disk, so that the next "
        "question about the folder is answered at once. The answer goes to standard output.",
        epilog='Example: linnet ask --path docs "What differs from the papers?"',
    )
    parser.add_argument("question", nargs="?", help="or - to read it from standard input")
    parser.add_argument("--model", default="bundled", help="model folder (default: %(default)s)")
    _add_files(parser.add_argument_group("files"))
    _add_cache(parser.add_argument_group("cache"))
    parser.add_argument(
        "--thinking", choices=("show", "fold"), help="what the model thinks (default: fold)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    add_sampling_options(parser, temperature=0.0)
    parser.set_defaults(run=run)


def _add_files(group) -> None:
    group.add_argument(
        "--path", default=".", metavar="FOLDER", help="or a file (default: this folder)"
    )
    group.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="take only files that match, as in .gitignore; repeatable",
    )
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out what matches; repeatable",
    )
    group.add_argument(
        "--no-ignore",
        action="store_true",
        help="take also what .gitignore files and the defaults leave out",
    )
    group.add_argument(
        "--max-file-kib", type=int, default=1024, help="larger files are left out (default: 1024)"
    )
    group.add_argument(
        "--order",
        choices=("path", "age"),
        default="path",
        help="of the files; age puts those changed last at the end, so that questions while you "
        "edit have less to read (default: path)",
    )
    group.add_argument(
        "--list", action="store_true", help="show which files are taken, and ask nothing"
    )


def _add_cache(group) -> None:
    group.add_argument(
        "--cache-dir", metavar="FOLDER", help="default: linnet/prefixes in the user's cache folder"
    )
    group.add_argument(
        "--cache-gib", type=float, default=4.0, help="most that it may hold (default: %(default)s)"
    )
    group.add_argument("--no-cache", action="store_true", help="read nothing from it, keep nothing")


def run(args: argparse.Namespace) -> int:
    """Pack the folder, and answer."""
    begin_s = time.perf_counter()

    from rich.console import Console

    from linnet.cli.folder_prompt import describe, list_files, read_prompt

    if args.list:
        list_files(read_prompt(args, "?"), Console())
        return 0
    params = sampling_params(args)
    prompt = read_prompt(args, _question(args))
    _check_room(args, prompt)
    console = Console(stderr=True)
    describe(prompt, console)
    engine = _engine(args, prompt)
    engine.start()
    try:
        ready_s = time.perf_counter() - begin_s
        answer = _answer(engine, args, prompt, params, console)
    finally:
        engine.stop()
    if answer is None:
        print("stopped; what was read is kept, so that the same command goes on", file=sys.stderr)
        return INTERRUPTED
    _report(args, prompt, answer, ready_s)
    return INTERRUPTED if answer.finish_reason == "cancelled" else 0


def _question(args: argparse.Namespace) -> str:
    question = sys.stdin.read() if args.question == "-" else args.question
    if question is None or not question.strip():
        raise ConfigError('there is no question; give one as in: linnet ask --path docs "Why?"')
    return question.strip()


def _check_room(args: argparse.Namespace, prompt: "FolderPrompt") -> None:
    """Refuse a prompt that the model is not made for."""
    from linnet.model.presets import config_of

    limit = args.max_model_len or config_of(args.model).max_position_embeddings
    needed = len(prompt.tokens) + args.max_tokens
    if needed > limit:
        raise DataError(
            f"{args.path!r} has {prompt.num_file_tokens:,} tokens in {len(prompt.files):,} files, "
            f"{needed:,} with the question and {args.max_tokens:,} for the answer; {args.model!r} "
            f"takes {limit:,}. Leave files out by --exclude or --include (the largest are "
            f"{prompt.largest}), or try a higher --max-model-len"
        )


def _engine(args: argparse.Namespace, prompt: "FolderPrompt") -> "Engine":
    from linnet.cli.kept_prefix import cache_folder
    from linnet.infer import Engine, EngineSettings

    folder = None
    if not args.no_cache:
        folder = Path(args.cache_dir) if args.cache_dir else cache_folder()
        # What is kept of private files is private as well.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = EngineSettings(
        max_sequences=1,
        max_model_len=len(prompt.tokens) + args.max_tokens,
        prefix_cache=folder is not None,
        spill_folder=folder,
        spill_bytes=int(args.cache_gib * GIB),
    )
    try:
        return Engine(load(args), settings)
    except MemoryPlanError as error:
        raise MemoryPlanError(f"{error}. The largest files are {prompt.largest}") from None


def _answer(
    engine: "Engine",
    args: argparse.Namespace,
    prompt: "FolderPrompt",
    params: "SamplingParams",
    console: "Console",
) -> "Answer | None":
    """Return the answer, with the time and the cached tokens of all; None if Ctrl-C came first."""
    from linnet.cli.answering import stream_answer
    from linnet.cli.kept_prefix import keep_prefix, stops_within
    from linnet.cli.screen import PromptBar

    bar = PromptBar(console)
    begin_s = time.perf_counter()
    kept = None
    if not args.no_cache:
        last = [file.num_tokens for file in prompt.files[-NUM_LAST_FILES:]]
        stops = stops_within(
            engine,
            prompt.num_shared,
            engine.settings.spill_bytes,
            last[::-1] if args.order == "age" else (),
        )
        try:
            kept = keep_prefix(engine, prompt.tokens[: prompt.num_shared + 1], stops, bar.show)
        finally:
            bar.stop()
        if not kept.is_complete:
            return None
    spent_s = time.perf_counter() - begin_s
    answer = stream_answer(engine, prompt.tokens, params, _display(args, bar))
    usage = answer.usage
    first_s = usage.first_token_s
    total = replace(
        usage,
        cached_tokens=kept.num_cached if kept else usage.cached_tokens,
        first_token_s=None if first_s is None else first_s + spent_s,
        total_s=usage.total_s + spent_s,
    )
    return replace(answer, usage=total)


def _display(args: argparse.Namespace, bar: "PromptBar") -> "Display":
    from rich.console import Console

    from linnet.cli.screen import PlainDisplay, TerminalDisplay, write_out

    if args.json:
        return PlainDisplay(lambda text: None, bar=bar)
    shows = args.thinking == "show"
    if sys.stdout.isatty():
        return TerminalDisplay(Console(highlight=False), shows, bar)
    return PlainDisplay(write_out, shows, bar)


def _report(
    args: argparse.Namespace, prompt: "FolderPrompt", answer: "Answer", ready_s: float
) -> None:
    from linnet.cli.answering import figures

    if not args.json:
        cut = "; cut off by --max-tokens" if answer.finish_reason == "length" else ""
        line = f"{figures(answer.usage)}{cut}; {ready_s:.2f} s before that for files and model"
        print(line, file=sys.stderr)
        return
    values = {
        "answer": answer.content,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        **asdict(answer.usage),
        "ready_s": ready_s,
        "files": [asdict(file) for file in prompt.files],
        "skipped": [asdict(file) for file in prompt.skipped],
    }
    print(json.dumps(values, ensure_ascii=False))
