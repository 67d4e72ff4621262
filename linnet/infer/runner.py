"""One step of the model over many sequences: prompts' chunks and single tokens together.

Sequences with one new token go through the native decode step, which reads each weight once for all
of them; longer pieces are packed into one varlen pass (MiniMax-01, section 3.3, separates the two
as well). Everything that runs the model is behind `Runner.run`, so that several processes can
stand behind it: see `linnet.infer.ranks`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from linnet.model.decode import decode_rows
from linnet.model.paged import PackedRows, PagedMemory, Row
from linnet.model.transformer import Model
from linnet.ops import lm_head


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence."""

    row: Row
    """With pages for them."""
    tokens: Sequence[int]
    num_logits: int = 0
    """Logits wanted after so many of the last tokens."""
    is_draft: bool = False
    """Whether `Step.commit` may be told to forget the tokens."""


class Uncommitted(Protocol):
    """Sequences whose new states wait for being kept; see `PackedRows.commit`."""

    def commit(self, keep: Sequence[bool]) -> None:
        """Keep the tokens of some of them."""
        ...


class Step:
    """What a step computed; no sequence has grown until `commit`."""

    def __init__(self, num_chunks: int) -> None:
        self.logits = [torch.empty(0)] * num_chunks
        """[num_logits, vocab] fp32 on the CPU for each chunk, in the order of the chunks."""
        self._packed: list[tuple[Uncommitted, list[int]]] = []
        self._rows: list[Row] = []

    def add_packed(self, rows: Uncommitted, places: list[int]) -> None:
        """Note sequences whose new states wait for `commit`, and the places of their chunks."""
        self._packed.append((rows, places))

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Note sequences whose states are replaced already."""
        self._rows += rows

    def commit(self, keep: Sequence[bool]) -> None:
        """Let each sequence have its tokens, or forget those of a draft.

        Args:
            keep: one claim per chunk; only drafts may be forgotten.
        """
        for packed, places in self._packed:
            packed.commit([keep[place] for place in places])
        for row in self._rows:
            row.length += 1


class Runner:
    """Runs a model over sequences in a paged memory.

    Args:
        model: in eval mode.
        memory: on its device.
        reads_logits: whether steps have logits; the model takes the tokens in either way.
    """

    def __init__(self, model: Model, memory: PagedMemory, reads_logits: bool = True) -> None:
        self.model, self.memory, self._reads_logits = model, memory, reads_logits

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Step:
        """Run one step.

        Args:
            chunks: of different sequences, each with at least one token.
        """
        step = Step(len(chunks))
        singles = [n for n, chunk in enumerate(chunks) if _is_single(chunk)]
        others = [n for n, chunk in enumerate(chunks) if not _is_single(chunk)]
        if others:
            self._run_packed(chunks, others, step)
        if singles and not self._run_singles(chunks, singles, step):
            self._run_packed(chunks, singles, step)
        return step

    def _run_singles(self, chunks: Sequence[Chunk], places: list[int], step: Step) -> bool:
        tokens, rows = [chunks[n].tokens[0] for n in places], [chunks[n].row for n in places]
        logits = decode_rows(self.model, tokens, self.memory, rows)
        if logits is None:
            return False
        for n, own in zip(places, logits, strict=True):
            step.logits[n] = own[: chunks[n].num_logits]
        step.add_rows(rows)
        return True

    def _run_packed(self, chunks: Sequence[Chunk], places: list[int], step: Step) -> None:
        device = self.model.device
        lengths = [len(chunks[n].tokens) for n in places]
        num_logits = [chunks[n].num_logits for n in places]
        rows = self._rows([chunks[n].row for n in places], lengths, num_logits)
        tokens = [token for n in places for token in chunks[n].tokens]
        hidden = self.model.continue_packed(torch.tensor([tokens], device=device), rows)[0]
        if self._reads_logits and sum(num_logits):
            logits = lm_head(hidden, self.model.lm_head.weight).cpu()
            for n, own in zip(places, logits.split(num_logits), strict=True):
                step.logits[n] = own
        step.add_packed(rows, places)

    def _rows(
        self, rows: Sequence[Row], lengths: Sequence[int], num_logits: Sequence[int]
    ) -> PackedRows:
        return PackedRows(self.memory, rows, lengths, self.model.device, num_logits)


def _is_single(chunk: Chunk) -> bool:
    return len(chunk.tokens) == 1 and not chunk.is_draft
