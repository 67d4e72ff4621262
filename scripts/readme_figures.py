"""Write the figures of the README from the JSON files under benchmarks/results.

    python scripts/readme_figures.py [--check]

With --check nothing is written; the exit code says whether the README is up to date.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN = "<!-- figures: written by scripts/readme_figures.py from benchmarks/results -->\n"
END = "<!-- /figures -->"


def main() -> int:
    """Update or check the README."""
    text = README.read_text(encoding="utf-8")
    updated = with_figures(text)
    if "--check" in sys.argv[1:]:
        return int(updated != text)
    README.write_text(updated, encoding="utf-8")
    return 0


def with_figures(text: str) -> str:
    """Return a README text with its figures replaced by the current ones."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n".join(figures()) + "\n" + END + after


def figures() -> Iterator[str]:
    """Yield the lines between the markers."""
    for folder in sorted((ROOT / "benchmarks" / "results").iterdir()):
        results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        yield f"Measured on `{folder.name}`, two threads.\n"
        runs = [name for name in sorted(results) if name.startswith("run_")]
        if runs:
            yield from run_table([results[name] for name in runs])
        for name in sorted(results):
            if name.startswith("bench_94m_"):
                yield from comparison_table(results[name])
        if "serving" in results:
            yield from serving_table(results["serving"])


def run_table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of trained models beside the compressors."""
    yield "| trained on the standard library | minutes | tokens | held-out bits per byte |"
    yield "|---|---|---|---|"
    for run in runs:
        summary = run["summary"]
        yield (
            f"| {run['name']} ({run['model']['params_active'] / 1e6:.1f}M active of "
            f"{run['model']['params_total'] / 1e6:.1f}M) | {summary['seconds'] / 60:.1f} | "
            f"{summary['tokens'] / 1e6:.1f}M | {summary['bits_per_byte']:.3f} |"
        )
    for name, bits in runs[0]["baselines"].items():
        yield f"| {name} | | | {bits:.3f} |"
    yield ""


def comparison_table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the table against transformers."""
    native = "in hardware" if result["machine"]["native_bf16"] else "without bf16 in hardware"
    where = f" ({native})" if result["dtype"] == "bfloat16" else ""
    yield f"| bench-94m, {result['dtype']}{where} | linnet | transformers 5.23 | ratio (spread) |"
    yield "|---|---|---|---|"
    for mode in ("training", "prefill", "decode"):
        row = result[mode]
        yield (
            f"| {mode}, tokens/s | {row['ours_tokens_per_s']:.0f} | "
            f"{row['theirs_tokens_per_s']:.0f} | {row['speedup']:.2f} "
            f"({row['speedup_min']:.2f} to {row['speedup_max']:.2f}) |"
        )
    ours, theirs = (
        result[f"training_peak_bytes_{side}"]["peak"] / 1e9 for side in ("linnet", "transformers")
    )
    ratio = f"{result['training_memory_ratio']:.2f}"
    yield f"| training, peak GB of the process | {ours:.2f} | {theirs:.2f} | {ratio} |"
    yield ""
    yield "Both with whole-head rotary and transformers' slopes, since its class has no other.\n"


def serving_table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the engine and the server."""
    yield "| serving | |"
    yield "|---|---|"
    if "runs" in result:
        singly, batched = (result[f"speedup_over_{side}"] for side in ("one_by_one", "batched"))
        yield (
            f"| bench-94m, {result['requests']} requests of {result['prompt_tokens']} + "
            f"{result['output_tokens']} tokens at once | {result['tokens_per_s']:.0f} tokens/s: "
            f"{singly:.1f} times transformers one by one, {batched:.1f} times its batch |"
        )
        prefix = result["prefix"]
        yield (
            f"| another question about {prefix['shared_tokens']:,} tokens | first token after "
            f"{prefix['second_s']:.2f} s instead of {prefix['first_s']:.2f} s |"
        )
    if long := result.get("long_prompt"):
        yield (
            f"| a prompt of {long['tokens']:,} tokens, {long['model']} model | "
            f"{long['seconds']:.0f} s, {long['taken_bytes'] / 1e9:.2f} GB beside the weights |"
        )
    if cold := result.get("cold_start"):
        yield f"| `linnet serve`, to the first token | {cold['first_token_s']:.1f} s |"
    yield ""


if __name__ == "__main__":
    sys.exit(main())
