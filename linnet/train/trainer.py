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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from linnet.data import (
    HeldOutSet,
    Loader,
    Source,
    TokenStore,
    compressed_bits_per_byte,
    evaluation_batches,
    open_source,
    tokenize_source,
)
from linnet.errors import ConfigError, TrainingError
from linnet.model.cost import cost_of, training_flops
from linnet.model.init import initialize
from linnet.model.moe import RouterStats
from linnet.model.transformer import Model
from linnet.storage import write_atomic
from linnet.text import Tokenizer
from linnet.train.checkpoint import (
    Progress,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from linnet.train.loss import batch_loss, held_out_nll
from linnet.train.machine import (
    compute_dtype,
    describe_machine,
    matmul_peak_flops,
    resident_bytes,
)
from linnet.train.metrics import MetricsWriter
from linnet.train.optim import build_optimizer, clip_gradients
from linnet.train.progress import TrainingProgress
from linnet.train.recipe import Recipe
from linnet.train.report import RUN_FILE
from linnet.train.schedule import batch_tokens, count_steps, learning_rate

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"


class Trainer:
    """One run of a recipe.

    Args:
        recipe: what to do.
        resume: go on from the newest checkpoint in the run's folder, if there is one.
        show_progress: draw a progress bar (or log a line now and then) on standard error.

    Raises:
        ConfigError: the run's folder is in use and `resume` is not set, or the tokenizer has more
            ids than the model.
        CheckpointError: the newest checkpoint is damaged or belongs to another model.
        DataError: the corpus cannot be read.
    """

    def __init__(self, recipe: Recipe, resume: bool = False, show_progress: bool = True) -> None:
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
        self._note_changes()
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        dtype = compute_dtype(recipe.train.dtype)
        self.model = Model(recipe.model, compute_dtype=dtype).train()
        self.model.activation_recompute = recipe.train.activation_recompute
        initialize(self.model, torch.Generator().manual_seed(recipe.seed))
        self._optimizer = build_optimizer(self.model, recipe.optim)
        self.source, self.model.tokenizer, train_store, held_out_store = self._prepare_data()
        train = recipe.train
        self._loader = Loader(train_store, train.micro_batch_tokens, train.seq_len, recipe.seed)
        self.held_out = evaluation_batches(
            held_out_store, train.micro_batch_tokens, train.seq_len, train.eval_tokens
        )
        self._final_held_out = evaluation_batches(
            held_out_store, train.micro_batch_tokens, train.seq_len, train.final_eval_tokens
        )
        self.progress = Progress()
        if saved:
            self.progress = load_checkpoint(saved[-1], self.model, self._optimizer)
            self._loader.load_state_dict(self.progress.data)
        self._peak_flops = matmul_peak_flops(dtype)
        per_sequence = training_flops(recipe.model, train.seq_len)
        self._flops_per_token = per_sequence / train.seq_len
        self._skipped_in_a_row = 0

    def run(self) -> dict[str, Any]:
        """Train to the end (or to Ctrl-C), save, and return the content of `run.json`.

        Raises:
            TrainingError: too many consecutive steps were not finite.
            CheckpointError: the disk refuses a checkpoint; those before are untouched.
        """
        if (record := self._finished_record()) is not None:
            return record
        recipe, progress = self.recipe, self.progress
        start_step = progress.step or None
        total_steps = progress.step + count_steps(recipe.train, progress.tokens)
        bar = TrainingProgress(
            total_steps, recipe.name, self._show_progress, initial_step=progress.step
        )
        saved_step = progress.step
        with (
            MetricsWriter(self.folder, resume_step=start_step) as metrics,
            bar,
            self._interruptible(),
        ):
            while not self.is_complete and not self._stop_requested:
                values = self._step()
                saves = self.is_complete or progress.step % recipe.train.save_every == 0
                measures = saves or progress.step % recipe.train.eval_every == 0
                if measures:
                    progress.bits_per_byte = self.measure(self.held_out)
                    values["eval/bits_per_byte"] = progress.bits_per_byte
                if measures or progress.step % recipe.train.log_every == 0:
                    metrics.write(progress.step, values)
                bar.update(
                    progress.step,
                    loss=values["train/loss"],
                    tokens_per_s=values["train/tokens_per_s"],
                    mfu=values["train/mfu"],
                    bits_per_byte=values.get("eval/bits_per_byte"),
                )
                if saves:
                    self._save()
                    saved_step = progress.step
            if progress.step != saved_step:  # stopped, at whatever moment
                progress.bits_per_byte = self.measure(self.held_out)
                self._save()
        return self._finish()

    @property
    def is_complete(self) -> bool:
        """Whether all tokens of the recipe have been seen."""
        return self.progress.tokens >= self.recipe.train.total_tokens

    def measure(self, held_out: HeldOutSet) -> float:
        """Return the bits per UTF-8 byte of held-out documents."""
        return held_out_nll(self.model, held_out) / math.log(2) / held_out.num_bytes

    def _step(self) -> dict[str, float]:
        """Take one optimizer step and return its metrics."""
        start_s = time.perf_counter()
        progress, optim, train = self.progress, self.recipe.optim, self.recipe.train
        size = batch_tokens(progress.tokens, train)
        rate = learning_rate(progress.step, progress.tokens, optim, train.total_tokens)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        values = self._accumulate(size // train.micro_batch_tokens)
        norm = clip_gradients(self.model, optim.grad_clip)
        if math.isfinite(norm) and math.isfinite(values["train/loss"]):
            self._optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self._skip(values["train/loss"], norm)
        self._optimizer.zero_grad()
        progress.step += 1
        progress.tokens += size
        elapsed_s = time.perf_counter() - start_s
        progress.seconds += elapsed_s
        progress.data = self._loader.state_dict()
        return values | {
            "train/learning_rate": rate,
            "train/grad_norm": norm,
            "train/tokens": progress.tokens,
            "train/batch_tokens": size,
            "train/tokens_per_s": size / elapsed_s,
            "train/mfu": size / elapsed_s * self._flops_per_token / self._peak_flops,
            "train/skipped_steps": progress.skipped_steps,
            "memory/rss_bytes": resident_bytes(),
        }

    def _accumulate(self, num_micro_batches: int) -> dict[str, float]:
        """Add up the gradients of one batch; return loss and router metrics."""
        optim = self.recipe.optim
        batches = [next(self._loader) for _ in range(num_micro_batches)]
        num_targets = sum(batch.num_targets for batch in batches)
        nll = aux = 0.0
        router: list[list[RouterStats]] = []
        for batch in batches:
            loss = batch_loss(self.model, batch, optim.aux_loss_normalization)
            share = batch.num_targets / num_targets
            (loss.nll / num_targets + optim.aux_loss_coef * share * loss.aux).backward()
            nll += loss.nll.item()
            aux += loss.aux.item() * share
            router.append(loss.router)
        load = torch.stack([torch.stack([s.load for s in stats]) for stats in router]).mean(0)
        previous = torch.tensor(self.progress.expert_load) if self.progress.expert_load else load
        self.progress.expert_load = torch.lerp(previous, load, 0.02).tolist()
        values = {"train/loss": nll / num_targets, "moe/aux_loss": aux}
        return values | router_metrics(router)

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
        save_checkpoint(self._checkpoints, self.model, self._optimizer, self.progress, keep)

    def _prepare_data(self) -> tuple[Source, Tokenizer, TokenStore, TokenStore]:
        data, vocab_size = self.recipe.data, self.recipe.model.vocab_size
        source = open_source(data.source, data.text_field, data.held_out)
        folder = Path(data.folder) if data.folder is not None else self.folder / "data"
        if data.tokenizer is not None:
            tokenizer = Tokenizer.load(data.tokenizer)
        else:
            tokenizer = self._own_tokenizer(source, folder / "tokenizer")
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids; model.vocab_size is {vocab_size}"
            )
        stores = [
            tokenize_source(source, split, tokenizer, folder, progress=self._show_progress)
            for split in ("train", "held_out")
        ]
        return source, tokenizer, stores[0], stores[1]

    def _own_tokenizer(self, source: Source, folder: Path) -> Tokenizer:
        """Train a tokenizer on the training documents, or load the one trained before."""
        vocab_size = self.recipe.model.vocab_size
        made_from = {"source": source.fingerprint, "vocab_size": vocab_size}
        note = folder / "made_from.json"
        if note.is_file() and json.loads(note.read_text()) == made_from:
            return Tokenizer.load(folder)
        texts = (document.text for document in source.documents("train"))
        tokenizer = Tokenizer.train(texts, vocab_size, progress=self._show_progress)
        tokenizer.save(folder)
        write_atomic(note, json.dumps(made_from))
        return tokenizer

    def _finish(self) -> dict[str, Any]:
        """Save the model and `run.json`; a complete run is measured on more held-out text."""
        recipe, progress = self.recipe, self.progress
        held_out, bits_per_byte = self.held_out, progress.bits_per_byte
        if self.is_complete:
            held_out = self._final_held_out
            logger.info("measuring on %d held-out tokens", held_out.num_targets)
            bits_per_byte = self.measure(held_out)
        if bits_per_byte is None or not math.isfinite(bits_per_byte):
            raise TrainingError(
                f"the final model's held-out loss is {bits_per_byte}; the last good one is in "
                f"{self._checkpoints}"
            )
        self.model.save(self.folder / "model", overwrite=True)
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
            "baselines": self._baselines() if self.is_complete else {},
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
        """Write `run.json`, which the report is made from."""
        write_atomic(self.folder / RUN_FILE, json.dumps(run, indent=2) + "\n")

    def _baselines(self) -> dict[str, float]:
        chosen = set(self._final_held_out.documents.tolist())
        documents = enumerate(self.source.documents("held_out"))
        texts = [document.text for index, document in documents if index in chosen]
        kinds = {"each file": True, "one stream": False}
        return {
            f"{name}, {kind}": bits
            for kind, separately in kinds.items()
            for name, bits in compressed_bits_per_byte(texts, separately).items()
        }

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


def router_metrics(router: list[list[RouterStats]]) -> dict[str, float]:
    """Return the router's figures per layer, over all micro-batches of a step.

    Args:
        router: one list per micro-batch with one entry per layer.
    """
    values = {}
    for layer, stats in enumerate(zip(*router, strict=True)):
        load = torch.stack([s.load for s in stats]).mean(0)
        name = f"moe/layer_{layer:02d}"
        values[f"{name}/load_max_over_mean"] = float(load.max() / load.mean())
        values[f"{name}/dropped"] = float(sum(s.dropped for s in stats))
        values[f"{name}/entropy"] = float(torch.stack([s.entropy for s in stats]).mean())
    return values
