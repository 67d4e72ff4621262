"""What rounded weights cost: held-out bits per byte of a trained model in fp32, bf16 and int8.

    python benchmarks/int8_quality.py runs/nano [--tokens 200000]

Reads the folder of a `linnet train` run: its model, and which corpus it held documents out of.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import machine_facts, write_result

from linnet.config import build
from linnet.data import HeldOutSet, evaluation_batches, open_source, tokenize_source
from linnet.model.cost import cost_of
from linnet.model.weights import load_model
from linnet.train.loss import held_out_nll
from linnet.train.recipe import DataSection

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8_fp32_activations": {"dtype": "float32", "quantization": "int8"},
    "int8_bf16_activations": {"dtype": "bfloat16", "quantization": "int8"},
}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument(
        "--tokens", type=int, default=200_000, help="held-out tokens (default: 200000)"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = json.loads((args.run / "run.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        held_out = open_held_out(args.run, record["config"], args.tokens, Path(folder))
        values = measure(args.run / "model", held_out)
    values |= {
        "run": record["name"],
        "trained_tokens": record["summary"]["tokens"],
        "machine": machine_facts(args.threads),
    }
    path = write_result(f"int8_quality_{record['name']}", values)
    print(json.dumps(values, indent=2))
    print(f"wrote {path}")


def open_held_out(run: Path, config: dict[str, Any], tokens: int, folder: Path) -> HeldOutSet:
    """Return documents that the run never trained on."""
    data, train = build(DataSection, config["data"]), config["train"]
    source = open_source(data.source, data.text_field, data.held_out)
    tokenizer = load_model(run / "model", device="meta").tokenizer
    assert tokenizer is not None
    store = tokenize_source(source, "held_out", tokenizer, folder)
    return evaluation_batches(store, train["micro_batch_tokens"], train["seq_len"], tokens)


def measure(folder: Path, held_out: HeldOutSet) -> dict[str, Any]:
    """Return bits per byte and weight bytes by form, and the losses against fp32."""
    bits, weight_bytes = {}, {}
    for name, options in FORMS.items():
        model = load_model(folder, **options)
        nll = held_out_nll(model, held_out)
        bits[name] = nll / math.log(2) / held_out.num_bytes
        tensors = [*model.parameters(), *model.buffers()]
        weight_bytes[name] = sum(tensor.nbytes for tensor in tensors)
    return {
        "params_total": cost_of(model.config).params_total,
        "held_out_tokens": held_out.num_targets,
        "held_out_bytes": held_out.num_bytes,
        "bits_per_byte": bits,
        "loss_in_bits_per_byte": {name: value - bits["fp32"] for name, value in bits.items()},
        "weight_bytes": weight_bytes,
    }


if __name__ == "__main__":
    main()
