"""The training loop: data, model and optimizer joined, measured, saved and resumed.

One step takes `batch_tokens` tokens in micro-batches, sums their losses divided by the number of
targets of the whole batch, clips, and updates. Everything that the next step depends on is in a
checkpoint, so a resumed run takes the same steps, bit for bit, as one that was never interrupted.
"""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from linnet.errors import ConfigError, TrainingError
from linnet.model.cost import cost_of, training_flops
from linnet.parallel.launch import Launch
from linnet.storage import write_atomic
from linnet.train.alone import Alone
from linnet.train.checkpoint import Progress, list_checkpoints
from linnet.train.machine import (
    describe_machine,
    matmul_peak_flops,
    resident_bytes,
    return_freed_tensors,
)
from linnet.train.material import HeldOut
from linnet.train.metrics import MetricsWriter
from linnet.train.progress import TrainingProgress
from linnet.train.recipe import Recipe
from linnet.train.report import RUN_FILE
from linnet.train.schedule import batch_tokens, count_steps, learning_rate
from linnet.train.sft import SftRecipe
from linnet.train.workers import StepSums, Workers

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"
BALANCE_FILE = "balance.txt"


class Trainer:
    """One run of a recipe.

    Args:
        recipe: what to do.
        resume: go on from the newest checkpoint in the run's folder, if there is one.
        show_progress: draw a progress bar (or log a line now and then) on standard error.
        workers: the processes that train, for this one; None: it is alone.

    Raises:
        ConfigError: the run's folder is in use and `resume` is not set, or the tokenizer has more
            ids than the model.
        CheckpointError: the newest checkpoint is damaged or belongs to another model.
        DataError: the corpus cannot be read.
    """

    def __init__(
        self,
        recipe: Recipe | SftRecipe,
        resume: bool = False,
        show_progress: bool = True,
        workers: Workers | None = None,
    ) -> None:
        self.recipe = recipe
        self.folder = recipe.folder
        self._checkpoints = self.folder / "checkpoints"
        self._show_progress = show_progress
        self._stop_requested = False
        saved = list_checkpoints(self._checkpoints)
        if saved and not resume:
            raise ConfigError(
                f"{self.folder} holds a run already; resume it with --resume or rename this one"
            )
        if resume and not saved:
            logger.info("no checkpoint in %s; starting anew", self._checkpoints)
        if workers is None or workers.is_main:
            self._note_changes()
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        return_freed_tensors()
        self.workers = workers or Alone(recipe, show_progress)
        self.model, self.material = self.workers.model, self.workers.material
        self.progress = Progress()
        if saved:
            self.progress = self.workers.load(saved[-1])
            self.material.stream.load_state_dict(self.progress.data)
        self._peak_flops = matmul_peak_flops(self.model.compute_dtype) * self.workers.num_processes
        seq_len = recipe.train.seq_len
        self._flops_per_token = training_flops(recipe.model, seq_len) / seq_len
        self._skipped_in_a_row = 0

    def run(self) -> dict[str, Any]:
        """Train to the end (or to Ctrl-C), save, and return the content of `run.json`.

        Raises:
            TrainingError: too many consecutive steps were not finite, or another rank is gone.
            CheckpointError: the disk refuses a checkpoint; those before are untouched.
        """
        with self.workers.in_contact():
            return self._run()

    def _run(self) -> dict[str, Any]:
        if (record := self._finished_record()) is not None:
            return record
        recipe, progress = self.recipe, self.progress
        bar = TrainingProgress(
            self._total_steps(), recipe.name, self._show_progress, initial_step=progress.step
        )
        saved_step = progress.step
        with self._metrics() as metrics, bar, self._interruptible():
            while not self.is_complete and not self.workers.any(self._stop_requested):
                values = self._step()
                saves = self.is_complete or progress.step % recipe.train.save_every == 0
                measures = saves or progress.step % recipe.train.eval_every == 0
                if measures:
                    progress.bits_per_byte = self.measure(self.material.held_out)
                    values["eval/bits_per_byte"] = progress.bits_per_byte
                    self._write_balance()
                if metrics and (measures or progress.step % recipe.train.log_every == 0):
                    metrics.write(progress.step, values)
                bar.update(
                    progress.step,
                    total_steps=self._total_steps(),
                    loss=values["train/loss"],
                    tokens_per_s=values["train/tokens_per_s"],
                    mfu=values["train/mfu"],
                    bits_per_byte=values.get("eval/bits_per_byte"),
                )
                if saves:
                    self._save()
                    saved_step = progress.step
                self.workers.finish_saving(waits=False)
            if progress.step != saved_step:  # stopped, at whatever moment
                progress.bits_per_byte = self.measure(self.material.held_out)
                self._save()
            self.workers.finish_saving(waits=True)
        return self._finish()

    def _metrics(self) -> AbstractContextManager[MetricsWriter | None]:
        """Return the record of the run, where it is written."""
        if not self.workers.is_main:
            return nullcontext()
        return MetricsWriter(self.folder, resume_step=self.progress.step or None)

    def _write_balance(self) -> None:
        if (table := self.workers.balance()) and self.workers.is_main:
            write_atomic(self.folder / BALANCE_FILE, table)

    @property
    def is_complete(self) -> bool:
        """Whether all tokens of the recipe have been seen."""
        return self.progress.tokens >= self.recipe.train.total_tokens

    def _total_steps(self) -> int:
        # An estimate until the end: batches of whole dialogues are not quite full.
        return self.progress.step + count_steps(self.recipe.train, self.progress.tokens)

    def measure(self, held_out: HeldOut) -> float:
        """Return the bits per UTF-8 byte of held-out documents."""
        return self.workers.held_out_nll(held_out) / math.log(2) / held_out.num_bytes

    def _step(self) -> dict[str, float]:
        """Take one optimizer step and return its metrics."""
        start_s = time.perf_counter()
        progress, optim, train = self.progress, self.recipe.optim, self.recipe.train
        size = batch_tokens(progress.tokens, train)
        rate = learning_rate(progress.step, progress.tokens, optim, train.total_tokens)
        self.workers.set_learning_rate(rate)
        values = self._accumulate(size // train.micro_batch_tokens)
        num_tokens = int(values["train/batch_tokens"])
        norm = self.workers.clip(optim.grad_clip)
        is_finite = math.isfinite(norm) and math.isfinite(values["train/loss"])
        if is_finite:
            self._skipped_in_a_row = 0
        else:
            self._skip(values["train/loss"], norm)
        self.workers.update(applies=is_finite)
        progress.step += 1
        progress.tokens += num_tokens
        elapsed_s = time.perf_counter() - start_s
        progress.seconds += elapsed_s
        progress.data = self.material.stream.state_dict()
        return values | {
            "train/learning_rate": rate,
            "train/grad_norm": norm,
            "train/tokens": progress.tokens,
            "train/tokens_per_s": num_tokens / elapsed_s,
            "train/mfu": num_tokens / elapsed_s * self._flops_per_token / self._peak_flops,
            "train/skipped_steps": progress.skipped_steps,
            "memory/rss_bytes": resident_bytes(),
        }

    def _accumulate(self, num_rows: int) -> dict[str, float]:
        """Add up the gradients of one batch; return loss and router metrics."""
        sums = self.workers.accumulate(num_rows, self.progress.step + 1)
        load = sums.load
        previous = torch.tensor(self.progress.expert_load) if self.progress.expert_load else load
        self.progress.expert_load = torch.lerp(previous, load, 0.02).tolist()
        values = {
            "train/loss": sums.nll / sums.num_targets,
            "train/batch_tokens": sums.num_tokens,
            "moe/aux_loss": sums.aux,
        }
        return values | router_metrics(sums)

    def _skip(self, loss: float, norm: float) -> None:
        self.progress.skipped_steps += 1
        self._skipped_in_a_row += 1
        step = self.progress.step + 1
        logger.warning("step %d skipped: loss %s, gradient norm %s", step, loss, norm)
        if self._skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise TrainingError(
                f"{self._skipped_in_a_row} steps in a row were not finite (last: loss {loss}, "
                f"gradient norm {norm}); lower optim.learning_rate and resume from "
                f"{self._checkpoints}"
            )

    def _save(self) -> None:
        bits = self.progress.bits_per_byte
        if bits is None or not math.isfinite(bits):
            # A checkpoint of damaged weights would push out the good ones.
            logger.warning("step %d not saved: held-out loss is %s", self.progress.step, bits)
            return
        keep = self.recipe.train.keep_last
        self.workers.save(self._checkpoints, self.progress, keep)

    def _finish(self) -> dict[str, Any]:
        """Save the model and `run.json`; a complete run is measured on more held-out text."""
        recipe, progress = self.recipe, self.progress
        held_out, bits_per_byte = self.material.held_out, progress.bits_per_byte
        if self.is_complete:
            held_out = self.material.final_held_out
            logger.info("measuring on %d held-out tokens", held_out.num_targets)
            bits_per_byte = self.measure(held_out)
        if bits_per_byte is None or not math.isfinite(bits_per_byte):
            raise TrainingError(
                f"the final model's held-out loss is {bits_per_byte}; the last good one is in "
                f"{self._checkpoints}"
            )
        self.workers.export(self.folder / "model")
        cost = cost_of(recipe.model)
        speed = progress.tokens / max(progress.seconds, 1e-9)
        run = {
            "name": recipe.name,
            "complete": self.is_complete,
            "model": {"params_total": cost.params_total, "params_active": cost.params_active},
            "config": recipe.to_dict(),
            "environment": describe_machine(self.model.compute_dtype),
            "summary": {
                "bits_per_byte": bits_per_byte,
                "held_out_bytes": held_out.num_bytes,
                "steps": progress.step,
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "tokens_per_s": speed,
                "mfu": speed * self._flops_per_token / self._peak_flops,
                "peak_tflops": self._peak_flops / 1e12,
                "skipped_steps": progress.skipped_steps,
            },
            "expert_load": progress.expert_load,
            "baselines": self.material.baselines() if self.is_complete else {},
            "samples": [],
        }
        self.write_record(run)
        return run

    def _note_changes(self) -> None:
        """Keep the recipe in the run's folder; warn of what has changed since the run began."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, now = self.folder / RECIPE_FILE, self.recipe.to_dict()
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = now
        changed = [
            f"{section}.{key}"
            for section, values in now.items()
            if isinstance(values, dict)
            for key, value in values.items()
            if before.get(section, {}).get(key) != value
        ]
        if changed and list_checkpoints(self._checkpoints):
            logger.warning("changed since this run began: %s", ", ".join(changed))
        write_atomic(path, json.dumps(now, indent=2) + "\n")

    def _finished_record(self) -> dict[str, Any] | None:
        """Return the `run.json` of a run that had already ended, None if there is work to do."""
        try:
            record = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_whole = isinstance(record, dict) and record.get("complete") is True
        return record if is_whole and self.is_complete else None

    def write_record(self, run: dict[str, Any]) -> None:
        """Write `run.json`, which the report is made from, in the main process."""
        if self.workers.is_main:
            write_atomic(self.folder / RUN_FILE, json.dumps(run, indent=2) + "\n")

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end the run after the current step, with a checkpoint."""

        def request_stop(signum: int, frame: Any) -> None:
            del signum, frame
            self._stop_requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.warning(
                "stopping after this step and saving; press Ctrl-C again to quit at once"
            )

        try:
            previous = signal.signal(signal.SIGINT, request_stop)
        except ValueError:  # signals reach the main thread only
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def workers_of(
    recipe: Recipe | SftRecipe, launch: Launch | None, show_progress: bool
) -> Workers | None:
    """Return the processes that a launcher started, for this one; None for one on its own."""
    if launch is None:
        return None
    from linnet.train.ranks import ManyRanks, in_contact

    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    with in_contact(recipe):
        return ManyRanks(recipe, launch, show_progress)


def router_metrics(sums: StepSums) -> dict[str, float]:
    """Return the router's figures per layer, over all rows of a step."""
    values = {}
    for layer, load in enumerate(sums.load):
        name = f"moe/layer_{layer:02d}"
        values[f"{name}/load_max_over_mean"] = float(load.max() / load.mean())
        values[f"{name}/dropped"] = float(sums.dropped[layer])
        values[f"{name}/entropy"] = float(sums.entropy[layer])
    return values
