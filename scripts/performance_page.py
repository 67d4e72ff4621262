"""Write docs/performance.md from the JSON files under benchmarks/results.

    python scripts/performance_page.py [--check]

With --check nothing is written; the exit code says whether the page is up to date. A figure that a
file lacks, because it was written by an older benchmark, has no row.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "million.png"
RESULTS = ROOT / "benchmarks" / "results"
Result = Mapping[str, Any]  # Any: as read from JSON

# Theirs / ours in time, the targets on a CPU in bf16.
OPERATOR_TARGETS = {"forward": 4.0, "forward_backward": 5.0}
MODEL_TARGETS = {"training": 3.5, "prefill": 4.0, "decode": 4.0, "decode_int8": 6.0}
SEQUENCES_TARGET = 4.0
MEMORY_TARGET = 0.40
ENGINE_TARGETS = {"one_by_one": 8.0, "batched": 3.0}
PREFIX_TARGET = 20.0
OVERHEAD_TARGET = 0.05
PLAN_TARGET = 1.05
COLD_START_TARGET_S = 5.0
FLATNESS_TARGET = 0.85
SCALING_TARGET = 1.6  # from one process to two
NAMES = {
    "forward": "forward",
    "forward_backward": "forward + backward",
    "training": "training",
    "prefill": "prefill of 8,192 tokens",
    "decode": "decode, one sequence",
    "decode_int8": "decode, int8 weights against their bf16",
}
HEAD = """# How fast is linnet, and against what?

Written by `scripts/performance_page.py` from the files under `benchmarks/results`; every line links
to its own. `make bench` measures a CPU again, `make bench-million` the long prompt and
`make bench-gpu` a GPU.

The other side is transformers 5.23 with the same weights, unless a line says otherwise. Both run in
one process, in turn; a ratio is the median over pairs, with the smallest and largest in brackets.
The limit is this machine's own, measured in the same run: the rate of a large product, or of
reading memory. A share above 100% of memory reads means that part of the weights stayed in the
processor's cache; above 100% of the matmul peak, that the peak was measured in a slow moment of a
shared machine.
"""


class Row(NamedTuple):
    """One target and what became of it."""

    name: str
    linnet: str
    other: str
    ratio: float | None
    spread: str
    target: float | None
    source: str
    """Link to the JSON."""
    share: str = ""
    at_most: bool = False
    """Whether a smaller ratio is the better one."""
    is_own: bool = False
    """Whether both sides are linnet."""

    def verdict(self) -> str:
        """Return whether the target is met, in words."""
        if self.ratio is None:
            return "not measured"
        loses = self.ratio > 1 if self.at_most else self.ratio < 1
        lost = "; linnet loses here" if loses and not self.is_own else ""
        if self.target is None:
            return f"no target{lost}"
        is_met = self.ratio <= self.target if self.at_most else self.ratio >= self.target
        return "met" if is_met else f"**missed**{lost}"

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}{self.spread}"
        bound = "at most" if self.at_most else "at least"
        target = "" if self.target is None else f"{bound} {self.target:g}"
        name = f"[{self.name}]({self.source})"
        return name, self.linnet, self.other, ratio, target, self.verdict(), self.share


def main() -> int:
    """Update or check the page."""
    updated = page(RESULTS)
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != updated)
    PAGE.write_text(updated, encoding="utf-8")
    return 0


def page(results: Path) -> str:
    """Return the text of the page."""
    lines = [HEAD]
    gpus = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        if "gpu" in found:
            gpus.append((folder, found.pop("gpu")))
        if found:
            lines += device(folder, found)
    lines.append("## GPU\n")
    for folder, result in gpus:
        lines += gpu(folder, result)
    if not gpus:
        lines.append("No GPU result has been recorded yet.\n")
    return "\n".join(lines)


def device(folder: Path, found: dict[str, Result]) -> Iterator[str]:
    """Yield the section of one CPU."""
    yield f"## `{folder.name}`\n"
    rows, told = [], set()
    for name, result in sorted(found.items(), key=lambda item: item[0] != "lightning_attention"):
        source = link(folder / f"{name}.json")
        if name == "lightning_attention":
            rows += operator_rows(result, source)
        elif name.startswith("bench_94m_"):
            rows += model_rows(result, source)
        elif name == "serving":
            rows += serving_rows(result, source)
        elif name == "distributed":
            rows += distributed_rows(result, source)
        else:
            continue
        told.add(name)
        yield f"[{name}]({source}): {machine(result['machine'])}\n"
    if rows:
        titles = ("target", "linnet", "other side", "ratio (spread)", "target ratio", "met?")
        yield from table((*titles, "share of the limit"), (row.cells() for row in rows))
        yield summary(rows)
    if "lightning_attention" in found:
        yield from errors(found["lightning_attention"])
    for name in ("bench_94m_bfloat16", "bench_94m_float32"):
        if "prefill_lengths" in found.get(name, {}):
            yield from lengths(found[name], link(folder / f"{name}.json"))
    if "distributed" in found:
        yield from ranks(found["distributed"], link(folder / "distributed.json"))
    if "million" in found:
        yield from million(found["million"], link(folder / "million.json"))
        told.add("million")
    runs = {name: result for name, result in found.items() if name.startswith("run_")}
    if runs:
        yield from trained(folder, runs)
    others = sorted(found.keys() - told - runs.keys())
    if others:
        links = ", ".join(f"[{name}]({link(folder / f'{name}.json')})" for name in others)
        yield f"Also recorded: {links}.\n"


def machine(facts: Result) -> str:
    """Return what was measured on, in one line."""
    native = "with" if facts.get("native_bf16") else "without"
    parts = [
        f"{facts['cpu']}, {facts['threads']} threads, {native} bf16 products in hardware",
        f"torch {facts['torch']}",
    ]
    if peak := facts.get("matmul_peak_flops", facts.get("matmul_peak_flops_fp32")):
        parts.append(f"matmul peak {peak / 1e9:.0f} GFLOP/s")
    for key, name in (("read_bytes_per_s", "reads"), ("copy_bytes_per_s", "copies")):
        if key in facts:
            parts.append(f"{name} {facts[key] / 1e9:.1f} GB/s")
    return ", ".join(parts) + "."


def operator_rows(result: Result, source: str) -> Iterator[Row]:
    """Yield the rows of the operator alone."""
    shape = f"H = {result['heads']}, d = {result['head_dim']}"
    for row in result["rows"]:
        mode = row["mode"]
        yield Row(
            name=f"attention operator, {NAMES[mode]}, {shape}, T = {row['tokens']:,}",
            linnet=f"{row['ours_ms']:.1f} ms" if "ours_ms" in row else "too little memory",
            other=f"{row['theirs_ms']:.1f} ms" if "theirs_ms" in row else "too little memory",
            ratio=row.get("speedup"),
            spread=spread(row),
            target=OPERATOR_TARGETS[mode],
            source=source,
            share=share(row),
        )


def model_rows(result: Result, source: str) -> Iterator[Row]:
    """Yield the rows of a whole model."""
    has_targets = result["dtype"] == "bfloat16"
    where = f"{result['model']}, {result['dtype']}"

    def target(value: float) -> float | None:
        return value if has_targets else None

    for mode, goal in MODEL_TARGETS.items():
        if row := result.get(mode):
            ours, theirs = (f"{row[f'{x}_tokens_per_s']:,.0f} tokens/s" for x in ("ours", "theirs"))
            name = f"{where}: {NAMES[mode]}"
            ratio, ends = row["speedup"], spread(row)
            yield Row(name, ours, theirs, ratio, ends, target(goal), source, share(row))
    yield from own_rows(result, source, where, target)
    if "training_memory_ratio" in result:
        peaks = (result[f"training_peak_bytes_{x}"]["peak"] for x in ("linnet", "transformers"))
        ours, theirs = (f"{peak / 1e9:.2f} GB" for peak in peaks)
        yield Row(
            name=f"{where}: training, peak memory of the process",
            linnet=ours,
            other=theirs,
            ratio=result["training_memory_ratio"],
            spread="",
            target=target(MEMORY_TARGET),
            source=source,
            at_most=True,
        )


def own_rows(
    result: Result, source: str, where: str, target: Callable[[float], float | None]
) -> Iterator[Row]:
    """Yield the rows that compare linnet with itself."""
    if row := result.get("decode_16"):
        yield Row(
            name=f"{where}: decode, {row['sequences']} sequences against our own one",
            linnet=f"{row['ours_tokens_per_s']:,.0f} tokens/s",
            other=f"{row['one_sequence_tokens_per_s']:,.0f} tokens/s",
            ratio=row["speedup"],
            spread=spread(row),
            target=target(SEQUENCES_TARGET),
            source=source,
            share=share(row),
            is_own=True,
        )
    if row := result.get("prefill_lengths"):
        speeds = [x["tokens_per_s_without_softmax"] for x in row["rows"]]
        ends = [f"{x['tokens']:,}" for x in (row["rows"][0], row["rows"][-1])]
        yield Row(
            name=f"{where}: prefill flat from {ends[0]} to {ends[1]} tokens, without softmax",
            linnet=f"slowest {min(speeds):,.0f} tokens/s",
            other=f"fastest {max(speeds):,.0f} tokens/s, our own",
            ratio=row["flatness"],
            spread="",
            target=target(FLATNESS_TARGET),
            source=source,
            is_own=True,
        )


def serving_rows(result: Result, source: str) -> Iterator[Row]:
    """Yield the rows of the engine."""
    if "runs" in result:
        load = (
            f"{result['requests']} requests of {result['prompt_tokens']} + "
            f"{result['output_tokens']} tokens"
        )
        for side, name in (("one_by_one", "one by one"), ("batched", "in one batch")):
            yield Row(
                name=f"engine, {result['model']}, {result['dtype']}: {load}, the other side {name}",
                linnet=f"{result['tokens_per_s']:,.0f} tokens/s",
                other=f"{result[f'transformers_{side}_tokens_per_s']:,.1f} tokens/s",
                ratio=result[f"speedup_over_{side}"],
                spread="",
                target=ENGINE_TARGETS[side],
                source=source,
            )
        prefix = result["prefix"]
        yield Row(
            name=f"engine: first token after {prefix['shared_tokens']:,} shared tokens",
            linnet=f"second request {prefix['second_s']:.2f} s",
            other=f"first request {prefix['first_s']:.2f} s, our own",
            ratio=prefix["speedup"],
            spread="",
            target=PREFIX_TARGET,
            source=source,
            is_own=True,
        )
        yield Row(
            name="engine: share of a step outside of the model",
            linnet=f"{result['overhead']:.1%}",
            other="",
            ratio=result["overhead"],
            spread="",
            target=OVERHEAD_TARGET,
            source=source,
            at_most=True,
        )
    if long := result.get("long_prompt"):
        model = Path(long["model"]).name
        yield Row(
            name=f"engine, {model}: a prompt of {long['tokens']:,} tokens, memory",
            linnet=f"{long['taken_bytes'] / 1e9:.2f} GB in {long['seconds']:,.0f} s",
            other=f"planned {long['planned_bytes'] / 1e9:.2f} GB, our own",
            ratio=long["taken_over_planned"],
            spread="",
            target=PLAN_TARGET,
            source=source,
            at_most=True,
            is_own=True,
        )
    if cold := result.get("cold_start"):
        seconds = [run["first_token_s"] for run in cold["runs"]]
        yield Row(
            name="linnet serve, bundled: from the start of the process to the first token, seconds",
            linnet=f"{cold['first_token_s']:.1f} s",
            other="",
            ratio=cold["first_token_s"],
            spread=f" ({min(seconds):.2f} to {max(seconds):.2f})",
            target=COLD_START_TARGET_S,
            source=source,
            at_most=True,
        )


def distributed_rows(result: Result, source: str) -> Iterator[Row]:
    """Yield the rows of several ranks."""
    if scaling := result.get("scaling"):
        name = (
            f"{scaling['model']}, {scaling['dtype']}: training step of {scaling['tokens']:,} tokens"
        )
        for split in ("balanced", "contiguous"):
            row = scaling[split]
            ours, theirs = (scaling["tokens"] / row[f"{x}_s"] for x in ("ours", "theirs"))
            has_target = split == "balanced" and scaling["ranks"] == 2
            yield Row(
                name=f"{name}, {scaling['ranks']} ranks against 1, {split} split",
                linnet=f"{ours:,.0f} tokens/s",
                other=f"{theirs:,.0f} tokens/s, our own",
                ratio=row["speedup"],
                spread=spread(row),
                target=SCALING_TARGET if has_target else None,
                source=source,
                is_own=True,
            )
    if prompt := result.get("prefill"):
        ours, theirs = (prompt["tokens"] / prompt[f"{x}_s"] for x in ("ours", "theirs"))
        yield Row(
            name=f"{prompt['model']}, {prompt['dtype']}: prefill of {prompt['tokens']:,} tokens, "
            f"{prompt['ranks']} ranks that share it against 1",
            linnet=f"{ours:,.0f} tokens/s",
            other=f"{theirs:,.0f} tokens/s, our own",
            ratio=prompt["speedup"],
            spread=spread(prompt),
            target=None,
            source=source,
            is_own=True,
        )
    lasp = result.get("lasp", {"rows": []})
    for row in lasp["rows"]:
        where = f"emulated links of {row['delay_ms']:g} ms, " if lasp["emulation"] else ""
        if lasp["emulation"] and not row["delay_ms"]:
            continue
        yield Row(
            name=f"LASP+ against the original LASP, {where}{lasp['ranks']} ranks",
            linnet=f"{1e3 * row['lasp_plus']['ours_s']:.1f} ms",
            other=f"{1e3 * row['lasp_plus']['theirs_s']:.1f} ms, LASP",
            ratio=row["lasp_plus"]["speedup"],
            spread=spread(row["lasp_plus"]),
            target=None,
            source=source,
            is_own=True,
        )


def errors(result: Result) -> Iterator[str]:
    """Yield what the operator and the other side's loop lose against fp64."""
    recorded = result.get("errors_against_fp64", {})
    sides = {name: values for name, values in recorded.items() if isinstance(values, Mapping)}
    if sides:
        yield f"Relative errors of the operator against fp64 at T = {recorded['tokens']:,}:\n"
        names = next(iter(sides.values())).keys()
        cells = [(side, *(f"{x[name]:.1e}" for name in names)) for side, x in sides.items()]
        yield from table(("side", *names), cells)


def summary(rows: list[Row]) -> str:
    """Return how many targets are met, and which are not."""
    aimed = [row for row in rows if row.target is not None and row.ratio is not None]
    missed = [row.name for row in aimed if row.verdict() != "met"]
    text = f"{len(aimed) - len(missed)} of {len(aimed)} measured targets are met."
    return text + (f" Missed: {'; '.join(missed)}.\n" if missed else "\n")


def lengths(result: Result, source: str) -> Iterator[str]:
    """Yield the table of prefill by length."""
    yield (
        f"Prefill of {result['model']} in {result['dtype']} by length ([JSON]({source})). Its "
        "softmax layer is the last one, of which a prompt needs keys and values; transformers' "
        "class computes all of it. A model with more softmax layers pays for the earlier ones.\n"
    )
    titles = ("tokens", "tokens/s", "softmax operator's share", "tokens/s without it")
    rows = result["prefill_lengths"]["rows"]
    yield from table(
        (*titles, "share of the limit"),
        (
            (
                f"{row['tokens']:,}",
                f"{row['ours_tokens_per_s']:,.0f}",
                f"{row['softmax_share']:.0%}",
                f"{row['tokens_per_s_without_softmax']:,.0f}",
                share(row),
            )
            for row in rows
        ),
    )


def ranks(result: Result, source: str) -> Iterator[str]:
    """Yield the tables of what crosses ranks."""
    if lasp := result.get("lasp"):
        yield (
            f"LASP+ and the original LASP, forward + backward of the operator, {lasp['ranks']} "
            f"ranks, T = {lasp['tokens']:,}, H = {lasp['heads']}, d = {lasp['head_dim']} "
            f"([JSON]({source}))."
        )
        if lasp["emulation"]:
            yield f"This is an emulation of {lasp['what_is_emulated']}."
        yield "In a ring the states of LASP+ take as many hops as those of LASP.\n"
        titles = ("delay of a hop", "LASP", "LASP+, one hop", "ratio", "LASP+, in a ring", "ratio")
        yield from table(titles, (lasp_cells(row) for row in lasp["rows"]))
    if traffic := result.get("traffic"):
        yield (
            f"Bytes that each of {traffic['ranks']} ranks receives for one lightning layer, "
            f"H = {traffic['heads']}, d = {traffic['head_dim']}; the formula is "
            f"{traffic['formula']}.\n"
        )
        keys = ("tokens", "forward_bytes", "backward_bytes", "formula_bytes")
        titles = ("tokens", "forward, counted", "backward, counted", "formula")
        rows = (tuple(f"{row[key]:,}" for key in keys) for row in traffic["rows"])
        yield from table(titles, rows)


def lasp_cells(row: Result) -> tuple[str, ...]:
    """Return the cells of one delay."""
    cells = [f"{row['delay_ms']:g} ms", f"{1e3 * row['lasp_plus']['theirs_s']:.1f} ms"]
    for name in ("lasp_plus", "lasp_plus_ring"):
        side = row.get(name)
        cells += [f"{1e3 * side['ours_s']:.1f} ms" if side else "", ""]
        if side:
            cells[-1] = f"{side['speedup']:.2f}{spread(side)}"
    return tuple(cells)


def million(result: Result, source: str) -> Iterator[str]:
    """Yield the table and the picture of the long prompt."""
    yield "### A million tokens\n"
    sides = [(side, result[side]) for side in ("hybrid", "softmax") if side in result]
    models = "; ".join(
        f"{x['layers']}: {x['params_total'] / 1e6:.1f}M parameters in {x['dtype']}"
        for _, x in sides
    )
    yield (
        f"Random tokens in chunks of {result['chunk']:,} with a cache ([JSON]({source})). "
        f"{models}. {machine(result['machine'])} The hybrid's softmax layer is its last: of a "
        "prompt it needs keys and values alone.\n"
    )
    for _, side in sides:
        if side["limit_s"] is not None:
            yield f"{side['layers']}: stopped after {side['limit_s']:g} s.\n"
    rows = (
        (
            side["layers"],
            f"{row['tokens']:,}",
            f"{row['seconds']:,.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['cache_bytes'] / 1e9:.3f}",
        )
        for _, side in sides
        for row in side["rows"]
    )
    titles = ("model", "tokens", "seconds", "tokens/s", "peak GB of the process", "cache GB")
    yield from table(titles, rows)
    if PICTURE.exists():
        yield f"![time and memory against length]({PICTURE.name})\n"


def trained(folder: Path, runs: dict[str, Result]) -> Iterator[str]:
    """Yield the table of training runs."""
    yield "### Training runs\n"
    titles = ("run", "tokens", "minutes", "tokens/s", "share of matmul peak", "bits per byte")
    cells = []
    for name, run in runs.items():
        totals = run["summary"]
        cells.append(
            (
                f"[{run['name']}]({link(folder / f'{name}.json')})",
                f"{totals['tokens'] / 1e6:.1f}M",
                f"{totals['seconds'] / 60:.1f}",
                f"{totals['tokens_per_s']:,.0f}",
                f"{totals['mfu']:.0%}",
                f"{totals['bits_per_byte']:.3f}",
            )
        )
    yield from table(titles, cells)


def gpu(folder: Path, result: Result) -> Iterator[str]:
    """Yield the section of one GPU; times are ms, ratios are the other side's time over ours."""
    facts = result["machine"]
    yield f"### {facts['gpu']}\n"
    yield (
        f"torch {facts['torch']}, Triton {facts['triton']}, "
        f"copies {facts['copy_bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"bf16 products {facts['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s "
        f"([JSON]({link(folder / 'gpu.json')})). The limit is the slower of both for a kernel.\n"
    )
    rows = [
        cells for part in ("attention", "decode", "experts") for cells in gpu_rows(result, part)
    ]
    if rows:
        yield from table(("kernel", "linnet", "share of the limit", "other side", "ratio"), rows)
    if "tokens_per_s" in (model := result.get("model", {})):
        yield (
            f"Training {model['params'] / 1e9:.2f}B parameters "
            f"({model['params_active'] / 1e9:.2f}B active) at {model['tokens']:,} tokens: "
            f"{model['tokens_per_s']:,.0f} tokens/s, "
            f"{model['mfu_of_measured_peak']:.0%} of the measured peak, "
            f"{model['peak_memory_bytes'] / 1e9:.1f} GB.\n"
        )


def gpu_rows(result: Result, part: str) -> Iterator[tuple[str, ...]]:
    """Yield a row per kernel, and one per other side of it."""
    for row in result.get(part, []):
        sizes = row.get("shape") or [row[key] for key in ("batch", "rows") if key in row]
        label = f"{part} {' x '.join(map(str, sizes))}"
        if "failed" in row:
            yield label, "failed", "", "", row["failed"]
        for name, value in row.items():
            if not isinstance(value, Mapping):
                continue
            if "failed" in value:
                yield label, "", "", f"{name}: failed", value["failed"]
            if "share_of_roofline" in value:
                cells = (f"{value['ms']:.3f} ms", f"{value['share_of_roofline']:.0%}", "", "")
                yield (f"{label}, {name}", *cells)
                continue
            modes = value.items() if "speedup" not in value else [("", value)]
            for mode, ratio in modes:
                if isinstance(ratio, Mapping) and "speedup" in ratio:
                    text = f"{ratio['speedup']:.2f}{spread(ratio)}"
                    text += "; linnet loses here" if ratio["speedup"] < 1 else ""
                    where = ", ".join(filter(None, (label, mode)))
                    yield where, "", "", f"{name}: {ratio['ms']:.3f} ms", text


def spread(row: Result) -> str:
    """Return the smallest and largest ratio in brackets."""
    if "speedup_min" not in row:
        return ""
    return f" ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})"


def share(row: Result) -> str:
    """Return the share of the machine's limit, and which one."""
    return f"{row['share_of_limit']:.0%} of {row['limit']}" if "share_of_limit" in row else ""


def table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table, and an empty one."""
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for cells in rows:
        yield f"| {' | '.join(cells)} |"
    yield ""


def link(path: Path) -> str:
    """Return the address of a file as seen from the page."""
    return Path(os.path.relpath(path, PAGE.parent)).as_posix()


if __name__ == "__main__":
    sys.exit(main())
