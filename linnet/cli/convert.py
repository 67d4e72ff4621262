"""`linnet convert`: a checkpoint folder from one dialect to another."""

import argparse
from pathlib import Path

from linnet.errors import CheckpointError


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "convert",
        help="rewrite a model folder in another dialect or dtype",
        description="Read a model folder of any dialect and write it in another. The folder "
        "appears whole or not at all.",
        epilog="Example: linnet convert runs/nano/model nano-bf16 --dtype bfloat16",
    )
    parser.add_argument("source", help="model folder")
    parser.add_argument("target", help="folder to create")
    parser.add_argument(
        "--dialect",
        default="linnet",
        choices=("linnet", "minimax_m1", "minimax_text_01", "transformers"),
        help="names and config to write (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32", "float16"),
        help="of the weights, except routers, which stay fp32 (default: as they are)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert."""
    if not Path(args.source).is_dir():
        raise CheckpointError(f"model folder {args.source!r} does not exist")
    from linnet.model.weights import load_model

    model = load_model(args.source, dtype=args.dtype)
    model.save(args.target, dialect=args.dialect, overwrite=args.overwrite)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    print(f"wrote {args.target} ({args.dialect}, {dtype})")
    return 0
