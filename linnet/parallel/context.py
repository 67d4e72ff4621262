"""Context parallelism: a packed row over several ranks, applied to a model from outside.

Each rank holds all weights and part of the tokens. Only two operators look beyond a token, so only
they are replaced: lightning attention by LASP+, softmax attention by its ring.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from linnet.model.attention import LightningAttention, SoftmaxAttention
from linnet.model.transformer import Model
from linnet.parallel import ring_attention
from linnet.parallel.exchange import Mode, Nodes, StateExchange
from linnet.parallel.ring_attention import SoftmaxAcrossRanks
from linnet.parallel.sequence import LightningAcrossRanks
from linnet.parallel.split import split_row


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a packed row.

    Attributes:
        tokens: [1, T_r] int64.
        targets: [1, T_r] int64; the target of a part's last token is the next rank's first one.
        positions: [1, T_r] int64 of each token in its document.
        cu_seqlens: offsets of the documents in the whole row.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor


class ContextParallel:
    """The ranks that share each row, and how they exchange what crosses.

    Args:
        group: of the ranks, in the order of the row.
        is_balanced: each rank holds an early and a late piece, so that all have as much to attend
            to; states are then exchanged by `all_gather`.
        states: how lightning states travel.
        keys: how keys and values travel.
        nodes: for `states="two_level"`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        is_balanced: bool = False,
        states: Mode = "all_gather",
        keys: ring_attention.Exchange = "ring",
        nodes: Nodes | None = None,
    ) -> None:
        self.group, self.is_balanced = group, is_balanced
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._lightning = LightningAcrossRanks(StateExchange(group, states, nodes), is_balanced)
        self._softmax = SoftmaxAcrossRanks(group, keys, is_balanced)

    def apply(self, model: Model) -> None:
        """Let the model's attention reach over the ranks; it then takes shards only."""
        for layer in model.layers:
            if isinstance(layer.self_attn, LightningAttention):
                layer.self_attn.attend = self._lightning
            elif isinstance(layer.self_attn, SoftmaxAttention):
                layer.self_attn.attend = self._softmax

    def shard(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Shard:
        """Return this rank's part of a row that every rank has.

        Args:
            tokens: [1, T] int64.
            targets: [1, T] int64, already shifted.
            cu_seqlens: [N + 1] offsets of the documents.

        Raises:
            ValueError: there are fewer tokens than pieces.
        """
        split = split_row(cu_seqlens, self.size, self.is_balanced)
        own = split.tokens(self.rank).to(tokens.device)
        positions = split.positions(self.rank).to(tokens.device)
        return Shard(tokens[:, own], targets[:, own], positions, cu_seqlens.cpu())
