"""Options that several verbs share: the model, and how its tokens are chosen."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linnet.infer import SamplingParams
    from linnet.model import Model


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add how a model is loaded."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="to compute in; auto is bfloat16 where this CPU multiplies it in hardware",
    )
    parser.add_argument(
        "--quantization", choices=("int8",), help="round the weights, for speed and memory"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add how a model is loaded, and how long its requests may be."""
    add_loading_options(parser)
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="of a prompt and its answer (default: what the model is made for, if it fits)",
    )


def add_sampling_options(
    parser: argparse.ArgumentParser, temperature: float, max_tokens: int = 1024
) -> None:
    """Add how tokens are chosen."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, help="of an answer (default: %(default)s)"
    )
    group.add_argument(
        "--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--min-p", type=float, default=0.0, help="default: %(default)s")
    group.add_argument("--seed", type=int, help="same seed, same text")
    group.add_argument("--stop", action="append", default=[], help="text that ends it; repeatable")
    group.add_argument(
        "--thinking-budget", type=int, metavar="TOKENS", help="most that it may think"
    )


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    """Return what `add_sampling_options` was given.

    Raises:
        ValueError: a value is out of range.
    """
    from linnet.infer import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=tuple(args.stop),
        thinking_budget=args.thinking_budget,
    )


def load(args: argparse.Namespace) -> "Model":
    """Load the model that `add_loading_options` and `args.model` say.

    Raises:
        CheckpointError: its folder is missing or damaged.
        ConfigError: its config is wrong.
    """
    from linnet.model.weights import load_model
    from linnet.train.machine import compute_dtype

    return load_model(args.model, dtype=compute_dtype(args.dtype), quantization=args.quantization)
