"""The tables that `linnet plan` prints."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from linnet.model import ModelConfig
    from linnet.parallel.plan import Cluster, Efficiency, Estimate, Phase, Plans

MIN_SHARE = 0.0005
"""Parts of a time that are less are left out."""


def print_plan(
    model: str,
    config: "ModelConfig",
    cluster: "Cluster",
    efficiency: "Efficiency",
    tried: "Sequence[Plans]",
    top: int,
) -> None:
    """Print the answer for one length: the sentence, the tables, the reasons."""
    from rich.console import Console

    from linnet.parallel.plan import ServingJob, headline, reasons

    console = Console()
    plans = tried[-1]
    console.print(headline(model, cluster, plans), highlight=False, style="bold", soft_wrap=True)
    if plans.best:
        best = plans.best[0]
        console.print(_layouts(plans.best[:top]))
        console.print(_memory(best))
        for phase in best.phases:
            console.print(_times(phase))
            if phase.volumes:
                console.print(_volumes(phase))
    console.print("Why", style="bold")
    for line in reasons(config, cluster, tried):
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    console.print("Assumed", style="bold")
    for line in assumptions(cluster, efficiency, isinstance(plans.job, ServingJob)):
        console.print(f"- {line}", highlight=False, soft_wrap=True)


def print_lengths(model: str, cluster: "Cluster", answers: "Sequence[Plans]") -> None:
    """Print one row for the best plan of each length."""
    from rich.console import Console
    from rich.table import Table

    from linnet.parallel.plan import ServingJob, gib, rate_text, time_text, tokens_text

    table = Table(title=f"{model} on {cluster}")
    is_serving = isinstance(answers[0].job, ServingJob)
    times = ("first token", "tokens/s then") if is_serving else ("step", "tokens/s")
    for name in ("context", "layout", "GiB", *times, "MFU", "limited by"):
        table.add_column(name, justify="left" if name in ("layout", "limited by") else "right")
    for plans in answers:
        context = tokens_text(plans.job.context)
        if not plans.best:
            needed = gib(plans.smallest.needed_bytes) if plans.smallest else "-"
            table.add_row(context, "none fits", needed, "-", "-", "-", "memory")
            continue
        best = plans.best[0]
        first, last = best.phases[0], best.phases[-1]
        weights = f" {plans.job.weights}" if isinstance(plans.job, ServingJob) else ""
        table.add_row(
            context,
            f"{best.layout}{weights}",
            gib(best.needed_bytes),
            time_text(first.seconds),
            rate_text(last.tokens_per_s),
            f"{first.mfu:.1%}",
            first.limit,
        )
    Console().print(table)


def assumptions(cluster: "Cluster", efficiency: "Efficiency", is_serving: bool) -> list[str]:
    """Return what the numbers rest on."""
    device = cluster.device
    e = efficiency
    lines = [
        f"{device.name}: {device.memory_gib:g} GiB, {device.tflops:g} TFLOP/s bf16, "
        f"{device.fp32_tflops:g} fp32, memory {device.hbm_gbs:g} GB/s, links {device.node_gbs:g} "
        f"GB/s in a node of {device.gpus_per_node} and {device.network_gbs:g} between nodes.",
        f"Of the peaks: products {e.matmul:g}, experts {e.experts:g}, softmax core {e.softmax:g}, "
        f"lightning core {e.lightning:g}, fp32 head {e.head:g}, memory bandwidth {e.hbm:g}, links "
        f"{e.links:g}; {e.memory:g} of the memory; the fullest expert rank has 1/"
        f"{e.expert_balance:g} of the mean. Replace with --efficiency.",
        f"Exchanges proceed during {e.overlap:g} of the computing that hides them: LASP+ behind "
        "the lightning core, keys and values behind the softmax core, FSDP behind all computing, "
        f"{e.hidden_dispatch:g} of the experts' behind other experts; sums over tp behind nothing.",
    ]
    if is_serving:
        lines.append(
            "Layouts are ranked by a prompt and 1,024 further tokens. `linnet serve` itself runs "
            "on one device; a layout of several says what this model needs."
        )
    return lines


def _layouts(estimates: "Sequence[Estimate]") -> "Table":
    from linnet.parallel.plan import gib, rate_text, time_text

    first = estimates[0]
    names = [name for name in first.choices if len({e.choices[name] for e in estimates}) > 1]
    columns = ["layout", *names, "GiB"]
    for phase in first.phases:
        columns += [phase.name, f"{phase.name} tokens/s"]
    rows = []
    for e in estimates:
        row = [str(e.layout), *(e.choices[name] for name in names), gib(e.needed_bytes)]
        for phase in e.phases:
            row += [time_text(phase.seconds), rate_text(phase.tokens_per_s)]
        rows.append([*row, f"{e.phases[0].mfu:.1%}"])
    same = ", ".join(
        f"{name} {value}" for name, value in first.choices.items() if name not in names
    )
    return _table("Best layouts", [*columns, "MFU"], rows, caption=same)


def _memory(estimate: "Estimate") -> "Table":
    from linnet.parallel.plan import gib

    parts = sorted(estimate.memory.items(), key=lambda item: -item[1])
    rows = [
        (name, f"{size / 2**30:,.2f}", f"{size / estimate.usable_bytes:.1%}")
        for name, size in parts
        if size
    ]
    free = estimate.usable_bytes - estimate.needed_bytes
    rows.append(("free", f"{free / 2**30:,.2f}", f"{free / estimate.usable_bytes:.1%}"))
    title = f"Memory of the fullest GPU, {gib(estimate.usable_bytes)} GiB usable"
    return _table(title, ("part", "GiB", "share"), rows)


def _times(phase: "Phase") -> "Table":
    from linnet.parallel.plan import time_text

    parts = sorted(phase.parts.items(), key=lambda item: -item[1])
    rows = [
        (name, time_text(seconds), f"{seconds / phase.seconds:.1%}")
        for name, seconds in parts
        if seconds > MIN_SHARE * phase.seconds
    ]
    title = f"Time of {phase.name}: {time_text(phase.seconds)}, MFU {phase.mfu:.1%}"
    return _table(title, ("part (what nothing hides)", "time", "share"), rows)


def _volumes(phase: "Phase") -> "Table":
    from linnet.parallel.plan import time_text

    rows = [
        (
            volume.name,
            volume.axis,
            bytes_text(volume.num_bytes),
            f"{volume.calls:,.0f}",
            time_text(phase.exchange_s.get(volume.name, 0.0)),
        )
        for volume in phase.volumes
    ]
    columns = ("exchange", "axis", "received per GPU", "calls", "time if not hidden")
    return _table(f"Exchanges of {phase.name}", columns, rows)


def bytes_text(num_bytes: float) -> str:
    """Return bytes with a binary unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:.0f} B"


def _table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], caption: str | None = None
) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    return table
