"""A run of many ranks: each has a part of the model and of the rows.

The loss is divided by the targets of all rows of all ranks, and gradients are added up: whatever
the layout, a step is that of one process, but for rounding.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from linnet import __version__
from linnet.data import PackedBatch
from linnet.errors import ConfigError, LinnetError, TrainingError
from linnet.model.moe import RouterStats
from linnet.model.presets import model_folder
from linnet.model.transformer import Model
from linnet.model.weights import load_model
from linnet.ops.cross_entropy import IGNORE
from linnet.parallel.agreement import agree_on_config, agree_on_rows
from linnet.parallel.apply import Exchanges, ParallelModel, local_part
from linnet.parallel.balance import Balance, balance_table, gather_rows
from linnet.parallel.context import Shard
from linnet.parallel.filling import FromFolder, FromSeed
from linnet.parallel.launch import Launch, connect, lost_contact
from linnet.parallel.mesh import Mesh
from linnet.parallel.pipeline import Pipeline
from linnet.train.alone import prepare
from linnet.train.checkpoint import Progress
from linnet.train.machine import compute_dtype
from linnet.train.material import HeldOut
from linnet.train.optim import build_optimizer
from linnet.train.rank_files import RankFiles
from linnet.train.recipe import Recipe
from linnet.train.row_loss import RowLoss
from linnet.train.sft import SftRecipe
from linnet.train.workers import StepSums

TOKENIZING_TIMEOUT = timedelta(days=1)
"""In which the first rank tokenizes a corpus, while the others wait."""


class ManyRanks:
    """One rank of a run; see `Workers`.

    Args:
        recipe: the same on all ranks.
        launch: which rank this is.
        show_progress: draw bars, on the first rank.

    Raises:
        ConfigError: the layout does not fit the ranks, the model or the batch, or ranks differ.
        DataError: the corpus cannot be read.
    """

    def __init__(self, recipe: Recipe | SftRecipe, launch: Launch, show_progress: bool) -> None:
        self.recipe, self.num_processes = recipe, launch.world_size
        self.is_main = launch.rank == 0
        layout = recipe.parallel.layout(launch.world_size)
        layout.check_model(recipe.model)
        self._check_batches(layout.num_rows, layout.pp)
        device = connect(launch)
        versions = {"linnet": __version__, "torch": torch.__version__}
        agree_on_config(recipe.to_dict() | versions)
        timeout = timedelta(seconds=recipe.parallel.timeout_s)
        self.mesh = Mesh(layout, device=device, timeout=timeout)
        self._world = self.mesh.group("world")
        self._row = self.mesh.rank("dp_replicate") * layout.dp_shard + self.mesh.rank("dp_shard")
        # The first rank tokenizes; the others then find that it is done.
        if self.is_main:
            prepare(recipe, show_progress)
        dist.monitored_barrier(timeout=TOKENIZING_TIMEOUT)
        self.material = prepare(recipe, False, self._row, layout.num_rows)
        self.parallel = self._build(launch, compute_dtype(recipe.train.dtype))
        self.model = self.parallel.model
        self.model.tokenizer = self.material.tokenizer
        self.optimizer = build_optimizer(self.parallel.parameters.values(), recipe.optim)
        save_group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(save_group, dist.ProcessGroup)
        self._save_group = save_group
        self._files = RankFiles(self.parallel, self.optimizer, save_group)
        self._loss = RowLoss(self.parallel, recipe.optim)
        self._last: StepSums | None = None
        self._received: list[int] = []
        self._pipeline = None
        if layout.pp > 1:
            self._pipeline = Pipeline(
                self.parallel.stage,
                self.mesh.group("pp"),
                recipe.model.hidden_size,
                self.model.compute_dtype,
                self._loss.nll,
                self._loss.scaled_aux,
            )

    def _check_batches(self, num_rows: int, num_stages: int) -> None:
        train = self.recipe.train
        for batch in (train.batch_tokens, *(size for _, size in train.batch_warmup)):
            rows = batch // train.micro_batch_tokens
            if rows % num_rows:
                raise ConfigError(
                    f"a batch of {rows} rows of train.micro_batch_tokens cannot be shared by "
                    f"dp_replicate*dp_shard = {num_rows}; make train.micro_batch_tokens smaller, "
                    "or let ranks share rows with parallel.cp"
                )
            if rows // num_rows < num_stages:
                raise ConfigError(
                    f"pp = {num_stages} stages need as many rows in turn; a batch of {rows} rows "
                    f"gives each of dp_replicate*dp_shard = {num_rows} only {rows // num_rows}"
                )

    def _build(self, launch: Launch, dtype: torch.dtype) -> ParallelModel:
        recipe, options = self.recipe, self.recipe.parallel
        if isinstance(recipe, SftRecipe):
            weights = FromFolder(model_folder(recipe.start))
        else:
            weights = FromSeed(recipe.seed)
        exchanges = Exchanges(
            states=options.states,
            node_size=options.node_size or launch.node_size,
            keys=options.keys,
            balanced=options.balanced,
            token_groups=options.token_groups,
        )
        parallel = ParallelModel(
            recipe.model,
            self.mesh,
            weights,
            exchanges,
            compute_dtype=dtype,
            length=recipe.train.seq_len,
        )
        parallel.stage.train()
        parallel.model.activation_recompute = recipe.train.activation_recompute
        return parallel

    def set_learning_rate(self, rate: float) -> None:
        """Set it for the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def accumulate(self, num_rows: int, step: int) -> StepSums:
        """Read the next rows, of all ranks together, and add up their gradients."""
        layout = self.mesh.layout
        batches = [next(self.material.stream) for _ in range(num_rows // layout.num_rows)]
        if step % self.recipe.parallel.check_every == 1 or self.recipe.parallel.check_every == 1:
            tokens = torch.cat([batch.tokens for batch in batches], 1)
            agree_on_rows(tokens, self._row, step, self._world)
        for router in self.parallel.routers:
            router.first = step % self.mesh.size("tokens")
        self._loss.begin([batch.num_targets for batch in batches], self._sum)
        shards = [self.parallel.shard(b.tokens, b.targets, b.cu_seqlens) for b in batches]
        if self._pipeline is not None:
            losses = self._pipeline.run(shards)
            nll = float(sum(loss.detach() for loss in losses)) if losses else 0.0
            router = self.parallel.stage.stats
        else:
            nll, router = self._run(shards)
        self._received = self.parallel.received_rows()
        num_tokens = sum(batch.tokens.shape[1] for batch in batches)
        self._last = self._sums(nll * self._loss.num_targets, num_tokens, shards, router)
        return self._last

    def _run(self, shards: list[Shard]) -> tuple[float, list[list[RouterStats]]]:
        """Take rows forward and backward; return the scaled loss and the router statistics."""
        nll, router = 0.0, []
        for shard in shards:
            hidden, stats = self.model.hidden_states(
                shard.tokens, shard.cu_seqlens, shard.positions
            )
            loss = self._loss.nll(hidden, shard.targets)
            (loss + self._loss.scaled_aux(stats, shard)).backward()
            nll += float(loss.detach())
            router.append(stats)
        return nll, router

    def _sums(
        self, nll: float, num_tokens: int, shards: list[Shard], router: list[list[RouterStats]]
    ) -> StepSums:
        """Add up what all ranks saw; every tp rank saw the same."""
        config, layout = self.recipe.model, self.mesh.layout
        shape = (config.num_hidden_layers, config.num_local_experts)
        load = torch.zeros(shape, dtype=torch.float64)
        dropped, entropy, tokens = (torch.zeros(shape[0]).double() for _ in range(3))
        for shard, stats in zip(shards, router, strict=True):
            length = shard.tokens.shape[1]
            for layer, s in zip(self.parallel.layers, stats, strict=True):
                load[layer] += s.load.cpu().double() * length
                entropy[layer] += float(s.entropy) * length
                dropped[layer] += float(s.dropped)
                tokens[layer] += length
        rows = num_tokens / (layout.cp * layout.pp)
        scalars = torch.tensor([nll, self._loss.aux, rows], dtype=torch.float64)
        total = self._sum(torch.cat((load.flatten(), dropped, entropy, tokens, scalars)))
        load, dropped, entropy, tokens, scalars = (total / layout.tp).split(
            [load.numel(), shape[0], shape[0], shape[0], 3]
        )
        return StepSums(
            nll=float(scalars[0]),
            aux=float(scalars[1]),
            num_targets=round(self._loss.num_targets),
            num_tokens=round(float(scalars[2])),
            load=(load.view(shape) / tokens[:, None]).float(),
            dropped=dropped,
            entropy=entropy / tokens,
        )

    def clip(self, max_norm: float) -> float:
        """Scale all gradients to a joint norm of at most `max_norm`; return the norm before."""
        parameters = self.parallel.parameters
        gradients = {n: local_part(p.grad) for n, p in parameters.items() if p.grad is not None}
        squares = [
            torch.linalg.vector_norm(gradient).double().square().cpu()
            / self.parallel.replicas[name]
            for name, gradient in gradients.items()
        ]
        norm = math.sqrt(float(self._sum(torch.stack(squares).sum()[None])))
        if 0 < max_norm < norm < float("inf"):
            for gradient in gradients.values():
                gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def update(self, applies: bool) -> None:
        """Change the weights by the gradients, if they are to be applied, and drop these."""
        if applies:
            self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def held_out_nll(self, held_out: HeldOut) -> float:
        """Return the negative log-likelihood of all targets, in nats."""
        self.parallel.stage.eval()
        self._loss.num_targets, total = 1.0, 0.0
        for batch, counts in self._own_batches(held_out):
            shard = self.parallel.shard(batch.tokens, batch.targets, batch.cu_seqlens)
            if self._pipeline is not None:
                loss = self._pipeline.evaluate(shard)
            else:
                hidden, _ = self.model.hidden_states(
                    shard.tokens, shard.cu_seqlens, shard.positions
                )
                loss = self._loss.nll(hidden, shard.targets)
            total += float(loss) if counts and loss is not None else 0.0
        self.parallel.stage.train()
        self.parallel.reshard()
        return float(self._sum(torch.tensor([total]).double())) / self.mesh.layout.tp

    def _own_batches(self, held_out: HeldOut) -> Iterator[tuple[PackedBatch, bool]]:
        """Yield as many batches as every rank has, and whether each counts."""
        size, first, number = self.mesh.layout.num_rows, None, -1
        for number, batch in enumerate(held_out):
            first = batch if first is None else first
            if number % size == self._row:
                yield _lengthened(batch, self.parallel.least_tokens), True
        if first is not None and (number + 1) % size and self._row >= (number + 1) % size:
            yield _lengthened(first, self.parallel.least_tokens), False

    def save(self, folder: Path, progress: Progress, keep_last: int) -> None:
        """Begin to write a checkpoint; the one before gets its name first."""
        self._files.save(folder, progress, keep_last)

    def finish_saving(self, waits: bool) -> None:
        """Give a checkpoint that is written its name; with `waits`, when it is written."""
        # A rank that stopped at a failure while others took a step would leave these waiting.
        if waits or (self._files.is_saving() and self.any(self._files.is_written())):
            self._files.finish_saving()

    def load(self, checkpoint: Path) -> Progress:
        """Go on from a checkpoint, of any number of processes."""
        return self._files.load(checkpoint)

    def export(self, folder: Path) -> None:
        """Write the finished model: each rank some of its files."""
        self._files.export(folder, self.material.tokenizer)

    def in_contact(self) -> AbstractContextManager[None]:
        """Turn what PyTorch raises when another rank is gone into one clear line."""
        return in_contact(self.recipe)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return bool(self._sum(torch.tensor([float(flag)]))[0])

    def balance(self) -> str:
        """Return how evenly the last step's tokens went to experts and ranks, as text."""
        if (sums := self._last) is None:
            return ""
        received = [0] * self.recipe.model.num_hidden_layers
        for number, count in zip(self.parallel.layers, self._received, strict=True):
            received[number] = count
        rows = gather_rows(received, self._save_group)
        stages = [rows[:, layer].nonzero().flatten() for layer in range(rows.shape[1])]
        return balance_table(
            [
                Balance(layer, load, rows[ranks, layer], int(sums.dropped[layer]), entropy)
                for layer, (load, ranks, entropy) in enumerate(
                    zip(sums.load, stages, sums.entropy.tolist(), strict=True)
                )
            ]
        )

    def finished_model(self, folder: Path) -> Model:
        """Return the whole model, read from disk."""
        return load_model(folder, dtype="float32")

    def _sum(self, x: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all ranks, the same bits on each."""
        x = x.clone()
        dist.all_reduce(x, group=self._world)
        return x


@contextmanager
def in_contact(recipe: Recipe | SftRecipe) -> Iterator[None]:
    """Turn what PyTorch raises when another rank is gone into one clear line.

    Raises:
        TrainingError: another rank is gone or silent.
    """
    try:
        yield
    except (RuntimeError, LinnetError) as error:
        if (reason := lost_contact(error)) is None:
            raise
        raise TrainingError(
            f"lost contact with another rank ({reason}); it died, or was silent for "
            f"parallel.timeout_s = {recipe.parallel.timeout_s:g} s. This rank stops; checkpoints "
            f"are in {recipe.folder / 'checkpoints'}, go on with --resume"
        ) from error


def _lengthened(batch: PackedBatch, least: int) -> PackedBatch:
    """Return a batch of enough tokens, with a document that carries no loss if need be."""
    missing = least - batch.tokens.shape[1]
    if missing <= 0:
        return batch
    end = int(batch.cu_seqlens[-1]) + missing
    return PackedBatch(
        tokens=torch.nn.functional.pad(batch.tokens, (0, missing)),
        targets=torch.nn.functional.pad(batch.targets, (0, missing), value=IGNORE),
        cu_seqlens=torch.cat((batch.cu_seqlens, batch.cu_seqlens.new_tensor([end]))),
        num_targets=batch.num_targets,
    )
