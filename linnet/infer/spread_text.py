"""One text over several ranks: rank 0 chooses the tokens, and all ranks take them in."""

from array import array

from torch import Tensor

from linnet.infer.plan import make_plan
from linnet.infer.ranks import EngineRanks, LedMemory, LedRunner
from linnet.infer.runner import Chunk
from linnet.model.paged import Row, pages_of


class SpreadText:
    """A sequence that ranks take in together; made on rank 0, while the others `follow`.

    Args:
        ranks: with their parts of the model.
        max_tokens: of the prompt and what follows it.
        chunk_tokens: most that are taken in at a time.

    Raises:
        MemoryPlanError: they do not fit; the message has the numbers.
    """

    def __init__(self, ranks: EngineRanks, max_tokens: int, chunk_tokens: int) -> None:
        make_plan(
            ranks.model,
            max_sequences=1,
            chunk_tokens=chunk_tokens,
            max_model_len=max_tokens,
            config=ranks.config,
            free=ranks.free_bytes,
            num_parts=ranks.num_parts,
        )
        num_pages = pages_of(max_tokens)
        memory = LedMemory(ranks, 1, num_pages, ranks.model.compute_dtype)
        memory.clear(0)
        self._runner = LedRunner(ranks, memory)
        self._row = Row(0, array("q", range(num_pages)))

    def extend(self, tokens: Tensor, is_last: bool) -> Tensor:
        """Take in tokens [1, T] on all ranks.

        Returns:
            Logits [1, 1, vocab] of the last one, if it is the last before one is drawn.
        """
        chunk = Chunk(self._row, tokens[0].tolist(), num_logits=int(is_last))
        step = self._runner.run([chunk])
        step.commit([True])
        return step.logits[0][None]
