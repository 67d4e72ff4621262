"""One model over many ranks: how the ranks are cut, and what is exchanged between them.

`apply.ParallelModel` puts it together, always in the same order; docs/parallelism.md explains it.
"""

from linnet.parallel.context import ContextParallel, Shard
from linnet.parallel.exchange import Nodes
from linnet.parallel.layout import Layout

__all__ = ["ContextParallel", "Layout", "Nodes", "Shard"]
