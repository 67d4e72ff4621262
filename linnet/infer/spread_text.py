"""One text over several ranks: rank 0 chooses the tokens, and all ranks take them in."""

from array import array

from torch import Tensor

from linnet.infer.ranks import EngineRanks, LedMemory, LedRunner
from linnet.infer.runner import Chunk
from linnet.model.paged import Row, pages_of


class SpreadText:
    """A sequence that ranks take in together; made on rank 0, while the others `follow`.

    Args:
        ranks: with their parts of the model.
        max_tokens: of the prompt and what follows it.
    """

    def __init__(self, ranks: EngineRanks, max_tokens: int) -> None:
        num_pages = pages_of(max_tokens)
        memory = LedMemory(ranks, 1, num_pages, ranks.model.compute_dtype)
        memory.clear(0)
        self._runner = LedRunner(ranks, memory)
        self._row = Row(0, array("q", range(num_pages)))

    def extend(self, tokens: Tensor) -> Tensor:
        """Take in tokens [1, T] on all ranks; return the logits [1, 1, vocab] of the last one."""
        step = self._runner.run([Chunk(self._row, tokens[0].tolist(), num_logits=1)])
        step.commit([True])
        return step.logits[0][None]
