"""One model over many ranks, applied from outside; so far the axis along the tokens of a row."""

from linnet.parallel.context import ContextParallel, Shard
from linnet.parallel.exchange import Nodes

__all__ = ["ContextParallel", "Nodes", "Shard"]
