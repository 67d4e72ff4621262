"""What the trainer asks of the processes that train: one alone, or many ranks together.

The loop is the same for both; what differs is behind `Workers`.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from linnet.model.transformer import Model
from linnet.train.checkpoint import Progress
from linnet.train.material import HeldOut, Material


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What one optimizer step saw, over all rows of all ranks.

    Attributes:
        nll: nats, summed over the targets.
        aux: load-balancing loss, averaged over layers and rows, without its coefficient.
        num_targets: tokens that were to be predicted.
        num_tokens: tokens read.
        load: [L, E] fp32 slots per token that each expert of each layer was asked for.
        dropped: [L] slots over capacity.
        entropy: [L] nats, of the routing probabilities, mean over tokens.
    """

    nll: float
    aux: float
    num_targets: int
    num_tokens: int
    load: Tensor
    dropped: Tensor
    entropy: Tensor


class Workers(Protocol):
    """The processes of a run.

    Attributes:
        is_main: whether this process writes what all share.
        model: this process's part.
        material: what it reads.
        num_processes: of all.
    """

    is_main: bool
    model: Model
    material: Material
    num_processes: int

    def set_learning_rate(self, rate: float) -> None:
        """Set it for the next update."""
        ...

    def accumulate(self, num_rows: int, step: int) -> StepSums:
        """Read the next rows, of all processes together, and add up their gradients.

        Raises:
            DataError: processes that should read the same do not.
        """
        ...

    def clip(self, max_norm: float) -> float:
        """Scale all gradients to a joint norm of at most `max_norm`; return the norm before."""
        ...

    def update(self, applies: bool) -> None:
        """Change the weights by the gradients, if they are to be applied, and drop these."""
        ...

    def held_out_nll(self, held_out: HeldOut) -> float:
        """Return the negative log-likelihood of all targets, in nats."""
        ...

    def save(self, folder: Path, progress: Progress, keep_last: int) -> None:
        """Write a checkpoint under a folder, perhaps in the background.

        Raises:
            CheckpointError: the disk refuses this one or the one before.
        """
        ...

    def finish_saving(self, waits: bool) -> None:
        """Give a checkpoint that is written its name; with `waits`, when it is written.

        Raises:
            CheckpointError: the disk refuses.
        """
        ...

    def load(self, checkpoint: Path) -> Progress:
        """Go on from a checkpoint, of any number of processes.

        Raises:
            CheckpointError: it is damaged or belongs to another model.
        """
        ...

    def export(self, folder: Path) -> None:
        """Write the finished model."""
        ...

    def in_contact(self) -> AbstractContextManager[None]:
        """Return a context in which the loss of another process is a `TrainingError`."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        ...

    def balance(self) -> str:
        """Return how evenly the last step's tokens went to experts and ranks, as text."""
        ...

    def finished_model(self, folder: Path) -> Model:
        """Return the whole model, to continue prompts with; in the main process."""
        ...
