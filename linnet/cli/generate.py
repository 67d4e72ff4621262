"""`linnet generate`: continue a text, streaming it to the terminal."""

import argparse
import sys
from typing import TYPE_CHECKING

from linnet.cli.options import (
    add_loading_options,
    add_rank_options,
    add_sampling_options,
    follow,
    launch_of,
    load,
    load_over_ranks,
    sampling_params,
)

if TYPE_CHECKING:
    from linnet.infer import SamplingParams
    from linnet.infer.ranks import EngineRanks
    from linnet.model import Model


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "generate",
        help="continue a text",
        description="Continue a prompt with a model folder; the text streams to standard output.",
        epilog='Example: linnet generate runs/nano/model "def main(" --temperature 0.8 --seed 1',
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument("prompt", help="text to continue, or - to read it from standard input")
    add_loading_options(parser)
    add_sampling_options(parser, temperature=0.8, max_tokens=256)
    add_rank_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate."""
    params, launch = sampling_params(args), launch_of(args)
    if launch is not None and launch.rank:
        return follow(load_over_ranks(args, launch))
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if launch is None:
        return _write(prompt, load(args), params)
    ranks = load_over_ranks(args, launch)
    try:
        return _write(prompt, ranks.model, params, ranks)
    finally:
        ranks.close()


def _write(
    prompt: str, model: "Model", params: "SamplingParams", ranks: "EngineRanks | None" = None
) -> int:
    from linnet.infer import stream_text

    pieces = stream_text(model, prompt, params, ranks)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
