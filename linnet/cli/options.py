"""Options that several verbs share: the model, and how its tokens are chosen."""

import argparse
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from linnet.errors import ConfigError, LinnetError

if TYPE_CHECKING:
    from linnet.infer import SamplingParams
    from linnet.infer.ranks import EngineRanks
    from linnet.model import Model
    from linnet.parallel.launch import Launch

T = TypeVar("T")

RANK_TIMEOUT = timedelta(minutes=10)
"""After which a rank that waits for another gives up."""


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


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Add how ranks share the model, where a launcher started several."""
    group = parser.add_argument_group(
        "ranks",
        f"with torchrun --nproc-per-node N -m linnet {parser.prog.split()[-1]} ..., the N "
        "processes share the model",
    )
    group.add_argument(
        "--tp",
        type=int,
        metavar="RANKS",
        help="that share the heads of attention (default: as many as divide the heads)",
    )
    group.add_argument(
        "--ep",
        type=int,
        metavar="RANKS",
        help="that share the experts (default: as many as divide them)",
    )
    group.add_argument(
        "--etp",
        type=int,
        metavar="RANKS",
        help="that share the width of each expert (default: what --ep leaves)",
    )
    group.add_argument(
        "--cp",
        type=int,
        metavar="RANKS",
        help="that share prompts, their keys and their values (default: what --tp leaves)",
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


def launch_of(args: argparse.Namespace) -> "Launch | None":
    """Return what a launcher says of this process; None for one on its own.

    Raises:
        ConfigError: the options of `add_rank_options` ask for more ranks than one.
    """
    from linnet.parallel.launch import launched

    launch = launched()
    for name, size in _rank_sizes(args).items():
        if launch is None and size is not None and size != 1:
            raise ConfigError(
                f"--{name} {size} needs several ranks; start them with torchrun "
                f"--nproc-per-node {max(2, size)} -m linnet {args.verb} ..."
            )
    return launch


def load_over_ranks(args: argparse.Namespace, launch: "Launch") -> "EngineRanks":
    """Load this rank's part of the model; if one rank cannot, all end, and the first says why.

    Raises:
        CheckpointError: its folder is missing or damaged.
        ConfigError: its config is wrong, or the ranks do not divide it.
    """
    from linnet.infer.ranks import EngineRanks
    from linnet.model.presets import config_of
    from linnet.parallel.inference import inference_layout
    from linnet.parallel.launch import connect
    from linnet.parallel.loading import load_parallel
    from linnet.parallel.mesh import Mesh
    from linnet.train.machine import compute_dtype

    device = connect(launch)
    size, sizes = launch.world_size, _rank_sizes(args)
    layout = _on_all(launch, lambda: inference_layout(config_of(args.model), size, **sizes))
    mesh = Mesh(layout, device=device, timeout=RANK_TIMEOUT)
    dtype = compute_dtype(args.dtype)
    model = _on_all(launch, lambda: load_parallel(args.model, mesh, dtype, args.quantization))
    return EngineRanks(model, mesh)


def _on_all(launch: "Launch", build: Callable[[], T]) -> T:
    """Return what `build` gives on each rank; where one fails, all end, and the first says why."""
    import torch.distributed as dist

    from linnet.parallel.channel import ranks_where

    result, failure = None, None
    try:
        result = build()
    except (LinnetError, ValueError, OSError, RuntimeError) as error:
        failure = error
    assert dist.group.WORLD is not None
    failed = ranks_where(failure is not None, dist.group.WORLD)
    if failure is not None and failed[0] == launch.rank:
        raise failure
    if failed or result is None:
        raise SystemExit(1)
    return result


def follow(ranks: "EngineRanks") -> int:
    """Do what rank 0 does until it ends; return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A launcher sends them to all ranks; rank 0 decides when the others end.
        signal.signal(number, signal.SIG_IGN)
    ranks.follow()
    return 0


def _rank_sizes(args: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(args, name, None) for name in ("tp", "ep", "etp", "cp")}
