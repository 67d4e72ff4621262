"""`linnet info`: what a model is and what it costs, without building it."""

import argparse
import dataclasses
import json

from linnet.errors import ConfigError

DEFAULT_LENGTHS = (1024, 8192, 32_768, 131_072, 1_048_576)
FIGURE_LENGTHS = (8, 16, 32, 40, 64, 80, 96, 100, 128)


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "info",
        help="parameters, bytes and FLOPs of a preset or a model folder",
        description="Print parameters, checkpoint and cache bytes, and FLOPs per token at several "
        "lengths, of a preset or a model folder. Nothing is loaded.",
        epilog="Example: linnet info minimax-m1 --json",
    )
    parser.add_argument("model", help="preset (nano, minimax-m1, ...) or model folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=DEFAULT_LENGTHS,
        metavar="N,N,...",
        help="sequence lengths in tokens for the FLOPs",
    )
    parser.add_argument(
        "--generation-flops",
        action="store_true",
        help="print MiniMax-M1's FLOPs against DeepSeek-R1's by length (M1 report, figure 1)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    from linnet.model.cost import cost_of, decode_flops, forward_flops, training_flops
    from linnet.model.presets import config_of

    config = config_of(args.model)
    values = {
        "model": args.model,
        **dataclasses.asdict(cost_of(config)),
        "flops_per_token": {
            str(length): {
                "forward": forward_flops(config, length) // length,
                "training": training_flops(config, length) // length,
                "decode": decode_flops(config, length - 1),
            }
            for length in args.lengths
        },
        "config": config.to_dict(),
    }
    if args.generation_flops:
        if (config.num_hidden_layers, config.hidden_size) != (80, 6144):
            raise ConfigError("--generation-flops is MiniMax-M1's figure; give minimax-m1")
        values["generation_flops"] = _generation_flops(config)
    if args.json:
        print(json.dumps(values, indent=2))
    else:
        _print(values)
    return 0


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1024,8192") from None
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError("lengths must be positive")
    return lengths


def _generation_flops(config) -> dict[str, dict[str, float]]:
    from linnet.model.cost import m1_generation_curve, r1_generation_curve

    ours, theirs = m1_generation_curve(config), r1_generation_curve()
    return {
        f"{n}K": {
            "model": float(ours.flops(n * 1024)),
            "deepseek-r1": float(theirs.flops(n * 1024)),
            "ratio": ours.flops(n * 1024) / theirs.flops(n * 1024),
        }
        for n in FIGURE_LENGTHS
    }


def _print(values: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=values["model"], show_header=False)
    table.add_row("parameters", f"{values['params_total']:,}")
    table.add_row("active per token, without embedding and LM head", f"{values['params_active']:,}")
    table.add_row("checkpoint, bf16 with fp32 routers", f"{values['checkpoint_bytes']:,} bytes")
    table.add_row("softmax cache, bf16", f"{values['kv_bytes_per_token']:,} bytes per token")
    table.add_row("lightning state, fp32", f"{values['state_bytes']:,} bytes per sequence")
    console.print(table)
    flops = Table("length", "forward", "training", "decode at this length", title="FLOPs per token")
    for length, row in values["flops_per_token"].items():
        flops.add_row(f"{int(length):,}", *(f"{row[key]:.4g}" for key in row))
    console.print(flops)
    if "generation_flops" in values:
        figure = Table(
            "tokens",
            values["model"],
            "DeepSeek-R1",
            "ratio",
            title="FLOPs of generating n tokens, as MiniMax-M1's figure 1 counts them",
        )
        for length, row in values["generation_flops"].items():
            cells = (f"{row['model']:.4g}", f"{row['deepseek-r1']:.4g}", f"{row['ratio']:.3f}")
            figure.add_row(length, *cells)
        console.print(figure)
