"""Which layers each pipeline stage has: neighbors, cut so that the costliest stage costs least."""

from functools import cache
from itertools import accumulate

from linnet.model.config import SOFTMAX, ModelConfig
from linnet.model.cost import attention_params


def stage_bounds(config: ModelConfig, num_stages: int, length: int) -> list[int]:
    """Return the first layer of each stage, and the number of layers.

    Softmax layers cost more the longer the sequences are; the last stage also has the LM head.

    Args:
        config: of the model.
        num_stages: of the pipeline; at most as many as layers.
        length: tokens of a sequence.
    """
    costs = layer_costs(config, length)
    costs[-1] += 2 * config.vocab_size * config.hidden_size
    total = [0, *accumulate(costs)]
    num_layers = len(costs)

    @cache
    def best(first: int, stages: int) -> tuple[int, tuple[int, ...]]:
        """Return the cost of the costliest of the stages from a layer on, and where they begin."""
        if stages == 1:
            return total[-1] - total[first], (first,)
        options = []
        for stop in range(first + 1, num_layers - stages + 2):
            rest, bounds = best(stop, stages - 1)
            options.append((max(total[stop] - total[first], rest), (first, *bounds)))
        return min(options)

    return [*best(0, num_stages)[1], num_layers]


def layer_costs(config: ModelConfig, length: int) -> list[int]:
    """Return the forward FLOPs of a token in each layer, in a sequence of some length."""
    experts = 6 * config.num_experts_per_tok * config.hidden_size * config.intermediate_size
    experts += 6 * config.shared_intermediate_size * config.hidden_size
    inner = config.inner_size
    core = {True: 2 * inner * length, False: 4 * inner * config.head_dim}
    return [
        experts + 2 * attention_params(config, kind) + core[kind == SOFTMAX]
        for kind in config.attn_type_list
    ]
