"""`linnet sft`: from a model folder and dialogues to a model that answers."""

import argparse

from linnet.cli.train import add_run_arguments, train


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "sft",
        help="fine-tune a model on dialogues",
        description="Train the model folder of a TOML recipe on dialogues, from .jsonl files (one "
        'object with "messages", and "tools" if any, per line) or made by built-in generators, '
        "mixed with plain text. Only the assistant's answers are learned. Measures bits per byte "
        "of held-out answers and writes a report.",
        epilog="Example: linnet sft recipes/bundled_1_short.toml --set train.total_tokens=100000",
    )
    add_run_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, then report."""
    from linnet.train import SftRecipe

    return train(SftRecipe.from_file(args.recipe, args.set), args)
