"""`linnet plan`: on which layout a model is best served or trained, and what limits it."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linnet.model import ModelConfig
    from linnet.parallel.plan import Cluster, Efficiency, Plans

UNITS = {"K": 2**10, "M": 2**20}
DEVICE_OPTIONS = {
    "memory_gib": "memory of a GPU, GiB",
    "tflops": "dense bf16 peak, 10^12 FLOP/s",
    "fp32_tflops": "fp32 peak, 10^12 FLOP/s",
    "hbm_gbs": "memory bandwidth, 10^9 bytes/s",
    "node_gbs": "to the other GPUs of a node, one way, 10^9 bytes/s",
    "network_gbs": "to other nodes, one way and per GPU, 10^9 bytes/s",
}


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "plan",
        help="the best layouts of a model on a cluster: memory, time, and what limits",
        description="Compare all ways to spread a model over GPUs, by arithmetic: memory per GPU, "
        "time and exchanges by part, and what limits. Nothing is loaded.",
        epilog="Example: linnet plan minimax-m1 --context 4M --gpus 8xH800",
    )
    parser.add_argument("model", help="preset (nano, minimax-m1, ...) or model folder")
    parser.add_argument(
        "--gpus", required=True, metavar="GPUS", help="8xH800, or 256x8xH800 for nodes of 8"
    )
    parser.add_argument(
        "--context",
        type=_lengths,
        default=(131_072,),
        metavar="N,N,...",
        help="tokens of a sequence; 128K and 4M are times 1,024 (default: 128K)",
    )
    parser.add_argument(
        "--mode",
        choices=("infer", "train"),
        help="default: infer, or train with --batch-tokens",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts to print")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--page", metavar="OUT", type=Path, help="write curves over length: OUT.html and OUT.png"
    )
    parser.add_argument(
        "--fix",
        type=_axes,
        default={},
        metavar="AXIS=N,...",
        help="sizes of axes that are given: pp, dp_replicate, dp_shard, cp, tp, ep, etp",
    )
    _add_job_options(parser)
    _add_machine_options(parser)
    parser.set_defaults(run=run)


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    infer = parser.add_argument_group("inference")
    infer.add_argument(
        "--weights",
        choices=("auto", "bf16", "experts-int8", "int8"),
        default="auto",
        help="auto takes the first of these that fits",
    )
    infer.add_argument("--kv", choices=("bf16", "fp8"), default="bf16", help="keys and values")
    infer.add_argument("--batch", type=int, default=1, metavar="N", help="sequences held at once")
    infer.add_argument(
        "--chunk-tokens", type=_length, default=8192, metavar="N", help="of a prompt at a time"
    )
    train = parser.add_argument_group("training")
    train.add_argument(
        "--batch-tokens", type=_length, metavar="N", help="tokens per step (default: 16M)"
    )
    train.add_argument(
        "--gather",
        choices=("bf16", "fp32"),
        default="fp32",
        help="in which FSDP gathers fp32 weights; linnet train gathers fp32 (default)",
    )
    train.add_argument("--recompute", choices=("auto", "none", "full"), default="auto")


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine", "replace what is known of a GPU, or describe one")
    for name, text in DEVICE_OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), type=float, metavar="X", help=text)
    group.add_argument("--gpus-per-node", type=int, metavar="N")
    group.add_argument(
        "--efficiency",
        type=_shares,
        default={},
        metavar="NAME=X,...",
        help="replace assumed shares of the peaks, such as matmul=0.7,softmax=0.6",
    )


def run(args: argparse.Namespace) -> int:
    """Search, and print what was found."""
    from linnet.cli.plan_tables import print_lengths, print_plan
    from linnet.model.presets import config_of
    from linnet.parallel.plan import check_fixed, cluster_of, headline

    config = config_of(args.model)
    machine = {name: getattr(args, name) for name in (*DEVICE_OPTIONS, "gpus_per_node")}
    cluster = cluster_of(args.gpus, **machine)
    efficiency = _efficiency(args.efficiency)
    check_fixed(args.fix)
    answers = [_search(args, config, cluster, efficiency, length) for length in args.context]
    if args.json:
        print(json.dumps(_as_json(args, config, cluster, efficiency, answers), indent=2))
    elif len(answers) == 1:
        print_plan(args.model, config, cluster, efficiency, answers[0], args.top)
    else:
        print_lengths(args.model, cluster, [tried[-1] for tried in answers])
        for tried in answers:
            print(headline(args.model, cluster, tried[-1]))
    if args.page:
        from linnet.cli.plan_page import write_page

        for path in write_page(args.page, args.model, config, cluster, efficiency):
            print(f"wrote {path}")
    return 0 if all(tried[-1].best for tried in answers) else 1


def _search(
    args: argparse.Namespace,
    config: "ModelConfig",
    cluster: "Cluster",
    efficiency: "Efficiency",
    length: int,
) -> "list[Plans]":
    """Return the searches of one length, the last of which is the answer."""
    from linnet.parallel.plan import (
        ServingJob,
        TrainingJob,
        search_any_weights,
        search_serving,
        search_training,
    )

    if (args.mode or ("train" if args.batch_tokens else "infer")) == "train":
        tokens = args.batch_tokens or 16 * UNITS["M"]
        job = TrainingJob(context=length, batch_tokens=tokens, gather=args.gather)
        again = {"auto": None, "none": False, "full": True}[args.recompute]
        return [search_training(config, cluster, job, efficiency, again, args.fix)]
    serving = ServingJob(
        context=length,
        sequences=args.batch,
        weights="bf16" if args.weights == "auto" else args.weights,
        keys=args.kv,
        chunk_tokens=args.chunk_tokens,
    )
    if args.weights == "auto":
        return search_any_weights(config, cluster, serving, efficiency, args.fix)
    return [search_serving(config, cluster, serving, efficiency, args.fix)]


def _as_json(
    args: argparse.Namespace,
    config: "ModelConfig",
    cluster: "Cluster",
    efficiency: "Efficiency",
    answers: "list[list[Plans]]",
) -> dict[str, object]:
    from linnet.parallel.plan import estimate_as_dict, headline, reasons

    return {
        "model": args.model,
        "gpus": cluster.num_gpus,
        "device": dataclasses.asdict(cluster.device),
        "efficiency": dataclasses.asdict(efficiency),
        "plans": [
            {
                "job": dataclasses.asdict(tried[-1].job),
                "fits": bool(tried[-1].best),
                "answer": headline(args.model, cluster, tried[-1]),
                "why": reasons(config, cluster, tried),
                "layouts": [estimate_as_dict(e) for e in tried[-1].best[: args.top]],
            }
            for tried in answers
        ],
    }


def _efficiency(shares: dict[str, float]) -> "Efficiency":
    from linnet.config import nearest
    from linnet.errors import ConfigError
    from linnet.parallel.plan import Efficiency

    known = [field.name for field in dataclasses.fields(Efficiency)]
    for name in shares:
        if name not in known:
            raise ConfigError(f"efficiency {name!r} is unknown{nearest(name, known)}")
    return Efficiency(**shares)


def _length(text: str) -> int:
    number, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    try:
        length = int(float(number) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no length such as 8192 or 4M") from None
    if length < 1:
        raise argparse.ArgumentTypeError("lengths must be positive")
    return length


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_length(part) for part in text.split(","))


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals and value for _, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value,...")
    return [(name.strip(), value) for name, _, value in pairs]


def _axes(text: str) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in _pairs(text)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as tp=8,ep=8") from None


def _shares(text: str) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in _pairs(text)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as matmul=0.7") from None
