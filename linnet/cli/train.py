"""`linnet train`: a recipe to a model, with its measurements, samples and report."""

import argparse
import json
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linnet.train import Recipe, SftRecipe, Trainer


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "train",
        help="train a model from a recipe",
        description="Train the model of a TOML recipe, measure it on held-out text beside zlib and "
        "xz, let it continue held-out documents, and write a report.",
        epilog="Example: linnet train recipes/nano.toml --set train.total_tokens=200000",
    )
    add_run_arguments(parser)
    parser.set_defaults(run=run)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every verb that trains takes."""
    parser.add_argument("recipe", help="TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a key, for example optim.learning_rate=1e-3; repeatable",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint, if any"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no printed recipe")


def run(args: argparse.Namespace) -> int:
    """Train, then report."""
    from linnet.train import Recipe

    return train(Recipe.from_file(args.recipe, args.set), args)


def train(recipe: "Recipe | SftRecipe", args: argparse.Namespace) -> int:
    """Run a recipe to its end (or to Ctrl-C), print the outcome and write the report."""
    from linnet.parallel.launch import disconnect, launched
    from linnet.train import Trainer, write_report
    from linnet.train.trainer import workers_of

    launch = launched()
    is_main = launch is None or launch.rank == 0
    show_progress = is_main and not args.quiet
    if show_progress:
        _print_recipe(recipe.to_dict())
    # Started anew by the launcher after a rank died: go on where all of them were.
    resume = args.resume or (launch is not None and launch.restarts > 0)
    trainer = Trainer(recipe, resume, show_progress, workers_of(recipe, launch, show_progress))
    run_record = trainer.run()
    disconnect(launch)
    if not is_main:
        return 0 if trainer.is_complete else 130
    if trainer.is_complete and not run_record["samples"]:
        run_record["samples"] = _samples(trainer, recipe.samples)
        trainer.write_record(run_record)
    _print_outcome(run_record)
    print(f"\nmodel   {recipe.folder / 'model'}")
    print(f"report  {write_report(recipe.folder)}")
    if not trainer.is_complete:
        changes = [word for change in args.set for word in ("--set", change)]
        start = ["linnet"]
        if launch is not None:
            start = ["torchrun", "--nproc-per-node", str(launch.node_size), "-m", "linnet"]
        command = shlex.join([*start, args.verb, args.recipe, *changes, "--resume"])
        print(f"stopped early; go on with: {command}")
        return 130
    return 0


def _samples(trainer: "Trainer", count: int) -> list[dict[str, str]]:
    """Let the model continue held-out prompts."""
    from linnet.infer import generate

    tokenizer = trainer.material.tokenizer
    model = trainer.workers.finished_model(trainer.folder / "model").eval()
    return [
        {
            "name": sample.name,
            "prompt": tokenizer.decode(sample.prompt),
            "completion": generate(
                model,
                sample.prompt,
                max_tokens=len(sample.truth),
                temperature=0.5,
                top_p=0.95,
                seed=0,
            ),
            "truth": tokenizer.decode(sample.truth),
        }
        for sample in trainer.material.samples(count)
    ]


def _print_recipe(recipe: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    for section, values in recipe.items():
        if isinstance(values, dict | list):
            for part in values if isinstance(values, list) else [values]:
                console.print(f"[bold]{section}[/]", json.dumps(part, separators=(", ", "=")))
        else:
            console.print(f"[bold]{section}[/] = {values}")


def _print_outcome(run_record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    console = Console()
    for sample in run_record["samples"]:
        text = f"[dim]{escape(sample['prompt'][-400:])}[/][bold]{escape(sample['completion'])}[/]"
        console.print(
            Panel(text, title=escape(sample["name"]), subtitle="bold: written by the model")
        )
    summary = run_record["summary"]
    table = Table("held-out text", "bits per byte", title=f"{summary['held_out_bytes']:,} bytes")
    table.add_row(run_record["name"], f"{summary['bits_per_byte']:.3f}", style="bold")
    for name, bits in run_record["baselines"].items():
        table.add_row(name, f"{bits:.3f}")
    console.print(table)
    console.print(
        f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s, "
        f"{summary['tokens_per_s']:.0f} tokens/s, MFU {summary['mfu']:.0%} of "
        f"{summary['peak_tflops']:.2f} TFLOP/s",
        highlight=False,
    )
