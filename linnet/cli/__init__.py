"""The `linnet` command: one verb per file, each with its parser and its work.

Errors that linnet raises on purpose end as one line on standard error and exit code 1; a traceback
appears only with `--debug`.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from linnet import __version__
from linnet.cli import ask, chat, convert, generate, info, plan, serve, sft, train
from linnet.errors import LinnetError

__all__ = ["build_parser", "main"]

INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="linnet",
        description="Hybrid lightning-attention mixture-of-experts language models.",
        epilog="Example: linnet train recipes/nano.toml",
    )
    parser.add_argument("--version", action="version", version=f"linnet {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in (train, sft, generate, chat, ask, serve, info, plan, convert):
        verb.add_parser(verbs)
    for verb_parser in verbs.choices.values():
        # Also after the verb, where one adds it to a command that failed.
        verb_parser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = build_parser().parse_args(arguments)
    rank = _rank()
    level = logging.INFO if rank in (None, "0") else logging.WARNING  # once is enough
    logging.basicConfig(level=level, format=f"{_prefix(rank)}%(message)s", stream=sys.stderr)
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, where a closed pipe can be caught
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`linnet ... | head`); nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (LinnetError, ValueError, OSError) as error:
        # ValueError: a wrong argument to an op or to sampling, worded for the caller.
        if args.debug:
            raise
        print(f"linnet: {_prefix(rank)}error:", " ".join(str(error).split()), file=sys.stderr)
        if rank is not None:
            # The other ranks may be gone, and an orderly end would wait for them.
            sys.stderr.flush()
            os._exit(1)
        return 1


def _rank() -> str | None:
    """Return the number of this process, if a launcher started several."""
    if "MASTER_ADDR" not in os.environ:
        return None
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID"))


def _prefix(rank: str | None) -> str:
    return "" if rank is None else f"rank {rank}: "
