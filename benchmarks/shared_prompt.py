"""The intake of a prompt on rank 0 alone, and on all ranks that share it and its pages."""

import argparse
from array import array
from functools import partial

import torch
import torch.distributed as dist
from harness import ratio
from ranks import (
    Values,
    all_ranks,
    dtype_on,
    model_of,
    say,
    together,
    within_tolerance,
)
from torch import Tensor

from linnet.infer.runner import Chunk, Runner
from linnet.infer.spread_runner import SpreadRunner
from linnet.model import Model
from linnet.model.paged import PAGE_SIZE, PagedMemory, Row, pages_of
from linnet.parallel.spread_pages import PageShare

CHUNK_TOKENS = 2048
"""Of a rank in one pass, as of `linnet generate`: one alone makes more passes, not longer ones."""


class Prompt:
    """A prompt that a runner takes in chunk by chunk.

    Args:
        model: in eval mode.
        tokens: of the prompt.
        share: of this rank; None where it has all of the pages.
    """

    def __init__(self, model: Model, tokens: list[int], share: PageShare | None) -> None:
        page_len = PAGE_SIZE if share is None else share.page_len
        sizes = (1, pages_of(len(tokens)), model.compute_dtype, model.device, page_len)
        self._memory, self._tokens = PagedMemory(model.config, *sizes), tokens
        self._chunk = CHUNK_TOKENS * (1 if share is None else share.size)
        if share is None:
            self._runner = Runner(model, self._memory)
        else:
            self._runner = SpreadRunner(model, self._memory, share)

    def take_in(self) -> Tensor:
        """Return the logits [1, vocab] of the last token."""
        row = Row(0, array("q", range(self._memory.num_pages)))
        self._memory.clear(row.slot)
        logits = torch.empty(0)
        for start in range(0, len(self._tokens), self._chunk):
            tokens = self._tokens[start : start + self._chunk]
            step = self._runner.run([Chunk(row, tokens, num_logits=1)])
            step.commit([True])
            logits = step.logits[0]
        return logits


def prefill(device: torch.device, args: argparse.Namespace) -> Values:
    """Time the intake on rank 0 alone and on all ranks."""
    difference = check(args.preset, device)
    say(f"logits agree with one process to {difference:.1e}")
    dtype = dtype_on(device)
    alone, shared = prompts(model_of(args.preset, dtype, device).eval(), args.tokens)
    seconds: dict[str, list[float]] = {"one": [], "shared": []}
    sides = {"one": partial(on_first_rank, alone), "shared": shared.take_in}
    for pair in range(args.pairs + 1):
        for name, side in sides.items():
            seconds[name].append(together(side, device))
        latest = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        say(f"{f'pair {pair} of {args.pairs}' if pair else 'warm-up'}: {latest}")
    return {
        "model": args.preset,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "chunk_tokens_per_rank": CHUNK_TOKENS,
        "largest_relative_difference": difference,
        **ratio(seconds["shared"][1:], seconds["one"][1:]),
    }


def on_first_rank(prompt: Prompt) -> None:
    """Let rank 0 take it in, while the others wait."""
    if dist.get_rank() == 0:
        prompt.take_in()


def prompts(model: Model, length: int) -> tuple[Prompt, Prompt]:
    """Return the same random prompt for one rank and for all."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
    return Prompt(model, tokens, None), Prompt(model, tokens, PageShare(all_ranks()))


def check(name: str, device: torch.device) -> float:
    """Return the largest difference of the logits, relative to the largest one, in fp32.

    Raises:
        SystemExit: it is too large for anything to be timed.
    """
    length = CHUNK_TOKENS * dist.get_world_size() + 1000  # a second chunk, which has a past
    alone, shared = prompts(model_of(name, torch.float32, device).eval(), length)
    expected, found = alone.take_in(), shared.take_in()
    worst = float((found - expected).abs().max() / expected.abs().max())
    return within_tolerance(worst, device)
