"""Steps on ranks that share sequences: each keeps some tokens of every page.

Short chunks and single tokens run on every rank; a long chunk is split, each rank computing a part.
"""

from collections.abc import Sequence

import torch

from linnet.infer.runner import Chunk, Runner, Step
from linnet.model.paged import PagedMemory, Row
from linnet.model.transformer import Model
from linnet.ops import lm_head
from linnet.parallel.split_prefill import run_split
from linnet.parallel.spread_pages import PageShare, SplitRow, SpreadRows

MIN_PART_LEN = 16
"""Tokens per rank under which a chunk is not split, to save the exchange of states; a guess."""


class SpreadRunner(Runner):
    """Runs a model over sequences in pages that ranks share; on all of them alike.

    Args:
        model: this rank's part of it, in eval mode.
        memory: with this rank's share of each page.
        share: which that is.
        reads_logits: as of `Runner`.
        min_part_len: a chunk of fewer tokens for each rank is not split.
    """

    def __init__(
        self,
        model: Model,
        memory: PagedMemory,
        share: PageShare,
        reads_logits: bool = True,
        min_part_len: int = MIN_PART_LEN,
    ) -> None:
        super().__init__(model, memory, reads_logits)
        self._share, self._min_part_len = share, min_part_len

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Step:
        """Run one step; see `Runner.run`."""
        step = Step(len(chunks))
        long = [n for n, chunk in enumerate(chunks) if self._is_long(chunk)]
        others = [n for n, chunk in enumerate(chunks) if not self._is_long(chunk)]
        for n in long:
            self._run_split(chunks[n], n, step)
        if others:
            self._run_packed(chunks, others, step)
        return step

    def _is_long(self, chunk: Chunk) -> bool:
        return len(chunk.tokens) >= self._share.size * self._min_part_len and not chunk.is_draft

    def _run_split(self, chunk: Chunk, place: int, step: Step) -> None:
        num_tokens, num_logits = len(chunk.tokens), chunk.num_logits
        row = SplitRow(self._share, self.memory, chunk.row, num_tokens, num_logits)
        hidden = run_split(self.model, chunk.tokens, row, num_logits)
        if self._reads_logits and num_logits:
            step.logits[place] = lm_head(hidden, self.model.lm_head.weight).cpu()
        step.add_packed(row, [place])

    def _rows(
        self, rows: Sequence[Row], lengths: Sequence[int], num_logits: Sequence[int]
    ) -> SpreadRows:
        device = self.model.device
        return SpreadRows(self._share, self.memory, rows, lengths, device, num_logits)
