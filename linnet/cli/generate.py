"""`linnet generate`: continue a text, streaming it to the terminal."""

import argparse
import sys

from linnet.cli.options import add_loading_options, add_sampling_options, load, sampling_params


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate."""
    from linnet.infer import stream_text

    params = sampling_params(args)
    model = load(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    pieces = stream_text(model, prompt, params)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
