"""The planner: on which layout a model runs best on a cluster, by arithmetic alone.

hardware   GPUs, links, and the assumed shares of their peaks
shape      parameters and FLOPs of a pipeline stage
volumes    bytes that ranks exchange
training   memory and time of a step; `training_memory` its bytes
serving    memory, first token, further tokens
search     all layouts, ranked
curves     the same over lengths, beside a model of softmax attention alone
answer     in words
"""

from linnet.parallel.plan.answer import (
    gib,
    headline,
    rate_text,
    reasons,
    time_text,
    tokens_text,
)
from linnet.parallel.plan.curves import TRAINING_GPUS, Curves, both_curves
from linnet.parallel.plan.estimate import Estimate, Phase, estimate_as_dict
from linnet.parallel.plan.hardware import DEVICES, Cluster, Device, Efficiency, cluster_of
from linnet.parallel.plan.search import (
    Plans,
    check_fixed,
    gpus_needed,
    search_any_weights,
    search_serving,
    search_training,
)
from linnet.parallel.plan.serving_memory import ServingJob
from linnet.parallel.plan.training_volumes import TrainingJob
from linnet.parallel.plan.volumes import Volume

__all__ = [
    "DEVICES",
    "TRAINING_GPUS",
    "Cluster",
    "Curves",
    "Device",
    "Efficiency",
    "Estimate",
    "Phase",
    "Plans",
    "ServingJob",
    "TrainingJob",
    "Volume",
    "both_curves",
    "check_fixed",
    "cluster_of",
    "estimate_as_dict",
    "gib",
    "gpus_needed",
    "headline",
    "rate_text",
    "reasons",
    "search_any_weights",
    "search_serving",
    "search_training",
    "time_text",
    "tokens_text",
]
