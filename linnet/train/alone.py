"""A run of one process: the whole model, all rows, checkpoints of one writer."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from linnet.data import PackedBatch
from linnet.model.init import initialize
from linnet.model.moe import RouterStats
from linnet.model.presets import model_folder
from linnet.model.transformer import Model
from linnet.model.weights import read_weights
from linnet.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from linnet.train.loss import batch_loss, held_out_nll
from linnet.train.machine import compute_dtype
from linnet.train.material import HeldOut, Material
from linnet.train.optim import build_optimizer, clip_gradients
from linnet.train.pretraining import prepare_documents
from linnet.train.recipe import Recipe
from linnet.train.sft import SftRecipe, prepare_dialogues
from linnet.train.workers import StepSums


def prepare(
    recipe: Recipe | SftRecipe, show_progress: bool, row: int = 0, num_rows: int = 1
) -> Material:
    """Open what a recipe trains on; see `prepare_documents` and `prepare_dialogues`."""
    if isinstance(recipe, SftRecipe):
        return prepare_dialogues(recipe, show_progress, row, num_rows)
    return prepare_documents(recipe, show_progress, row, num_rows)


class Alone:
    """The only process of a run; see `Workers`.

    Raises:
        CheckpointError: the weights to start from do not fit the recipe's model.
        ConfigError: the tokenizer has more ids than the model.
        DataError: the corpus cannot be read.
    """

    is_main = True
    num_processes = 1

    def __init__(self, recipe: Recipe | SftRecipe, show_progress: bool) -> None:
        self.recipe = recipe
        dtype = compute_dtype(recipe.train.dtype)
        self.model = Model(recipe.model, compute_dtype=dtype).train()
        self.model.activation_recompute = recipe.train.activation_recompute
        if isinstance(recipe, SftRecipe):
            read_weights(self.model, model_folder(recipe.start))
        else:
            initialize(self.model, torch.Generator().manual_seed(recipe.seed))
        self.optimizer = build_optimizer(self.model.parameters(), recipe.optim)
        self.material = prepare(recipe, show_progress)
        self.model.tokenizer = self.material.tokenizer

    def set_learning_rate(self, rate: float) -> None:
        """Set it for the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def accumulate(self, num_rows: int, step: int) -> StepSums:
        """Read the next rows and add up their gradients."""
        del step
        optim = self.recipe.optim
        batches = [next(self.material.stream) for _ in range(num_rows)]
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
        return step_sums(nll, aux, batches, router)

    def clip(self, max_norm: float) -> float:
        """Scale all gradients to a joint norm of at most `max_norm`; return the norm before."""
        return clip_gradients(self.model, max_norm)

    def update(self, applies: bool) -> None:
        """Change the weights by the gradients, if they are to be applied, and drop these."""
        if applies:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def held_out_nll(self, held_out: HeldOut) -> float:
        """Return the negative log-likelihood of all targets, in nats."""
        return held_out_nll(self.model, held_out)

    def save(self, folder: Path, progress: Progress, keep_last: int) -> None:
        """Write a checkpoint under a folder."""
        save_checkpoint(folder, self.model, self.optimizer, progress, keep_last)

    def finish_saving(self, waits: bool) -> None:
        """Nothing is written in the background."""
        del waits

    def load(self, checkpoint: Path) -> Progress:
        """Go on from a checkpoint, of any number of processes."""
        return load_checkpoint(checkpoint, self.model, self.optimizer)

    def export(self, folder: Path) -> None:
        """Write the finished model."""
        self.model.save(folder, overwrite=True)

    def in_contact(self) -> AbstractContextManager[None]:
        """Nobody else can be lost."""
        return nullcontext()

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def balance(self) -> str:
        """One process has nothing to balance."""
        return ""

    def finished_model(self, folder: Path) -> Model:
        """Return the model."""
        del folder
        return self.model


def step_sums(
    nll: float, aux: float, batches: list[PackedBatch], router: list[list[RouterStats]]
) -> StepSums:
    """Return the sums of one process's rows."""
    rows = list(zip(*router, strict=True))
    return StepSums(
        nll=nll,
        aux=aux,
        num_targets=sum(batch.num_targets for batch in batches),
        num_tokens=sum(batch.tokens.shape[1] for batch in batches),
        load=torch.stack([torch.stack([s.load for s in stats]).mean(0) for stats in rows]),
        dropped=torch.stack([torch.stack([s.dropped for s in stats]).sum() for stats in rows]),
        entropy=torch.stack([torch.stack([s.entropy for s in stats]).mean() for stats in rows]),
    )
