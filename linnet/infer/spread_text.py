"""One text over several ranks: rank 0 chooses the tokens, and all ranks take them in.

The ranks with the same heads share the sequence (`linnet.parallel.long_context`): each computes a
part of the prompt, and keeps a part of the keys and values.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from linnet.errors import EngineError
from linnet.model.transformer import Model
from linnet.parallel.channel import Channel

if TYPE_CHECKING:
    from linnet.parallel.mesh import Mesh


class SpreadText:
    """A sequence that ranks take in together; all of them make it, with their parts of the model.

    Args:
        model: from `linnet.parallel.loading.load_parallel`.
        mesh: of its ranks.
    """

    def __init__(self, model: Model, mesh: "Mesh") -> None:
        from linnet.parallel.long_context import LongContext

        self._device = model.device
        self._channel = Channel(mesh.group("world"))
        self._context = LongContext(model, mesh.group("dp_shard"))
        self.num_parts = dist.get_world_size(mesh.group("dp_shard"))
        """Ranks that share a long chunk of tokens."""
        self._is_open = self._channel.is_sender

    def extend(self, tokens: Tensor) -> Tensor:
        """Take in tokens [1, T] on all ranks; to be called on rank 0 alone.

        Returns:
            Logits [1, 1, vocab] fp32 of the last one.
        """
        is_open, self._is_open = self._is_open, False  # if it fails, the others wait elsewhere
        self._channel.send(tokens[0].tolist())
        logits = self._context.extend(tokens)
        self._is_open = is_open
        return logits

    def close(self) -> None:
        """Let the other ranks go; to be called on rank 0 alone."""
        if self._is_open:
            self._channel.send([])
            self._is_open = False

    def follow(self) -> None:
        """Take in on this rank, any but the first, what rank 0 takes in, until it closes.

        Raises:
            EngineError: rank 0 ended without a word.
        """
        while True:
            try:
                tokens = self._channel.receive()
            except RuntimeError as error:
                raise EngineError(f"rank 0 has ended, or is silent for too long: {error}") from None
            if not tokens:
                return
            self._context.extend(torch.tensor([tokens], device=self._device))
