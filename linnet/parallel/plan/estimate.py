"""What a plan says of one layout: bytes and seconds by part, and which part limits."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from linnet.parallel.layout import Layout
from linnet.parallel.plan.hardware import Cluster, Efficiency
from linnet.parallel.plan.volumes import Volume, group_of

BUBBLE = "pipeline bubble"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of work: a training step, a prompt's intake, one step of generation."""

    name: str
    parts: Mapping[str, float]
    """Seconds by part; of an exchange those that nothing hides. They add up to `seconds`."""
    volumes: tuple[Volume, ...]
    exchange_s: Mapping[str, float]
    """Seconds of each volume, hidden ones included."""
    tokens_per_s: float
    """Of all sequences and ranks together."""
    mfu: float
    """The model's FLOPs, without recomputation, over what the GPUs could do."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One layout with what it needs."""

    layout: Layout
    choices: Mapping[str, str]
    """What was chosen beside the layout: recomputation, micro-batches, dtypes, ..."""
    memory: Mapping[str, float]
    """Bytes of the fullest rank by part."""
    usable_bytes: float
    phases: tuple[Phase, ...] = ()
    """Empty if it does not fit."""
    cost_s: float = float("inf")
    """What plans are ranked by."""

    @property
    def needed_bytes(self) -> float:
        """Bytes of the fullest rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory holds it."""
        return self.needed_bytes <= self.usable_bytes


def estimate_as_dict(estimate: Estimate) -> dict[str, object]:
    """Return an estimate as JSON takes it, in bytes and seconds."""
    return {
        "layout": dataclasses.asdict(estimate.layout) | {"edp": estimate.layout.edp},
        "choices": dict(estimate.choices),
        "memory_bytes": dict(estimate.memory),
        "needed_bytes": estimate.needed_bytes,
        "usable_bytes": estimate.usable_bytes,
        "phases": {
            phase.name: {
                "seconds": phase.seconds,
                "tokens_per_s": phase.tokens_per_s,
                "mfu": phase.mfu,
                "limited_by": phase.limit,
                "parts_s": dict(phase.parts),
                "exchanges": [
                    dataclasses.asdict(volume) | {"seconds": phase.exchange_s.get(volume.name, 0.0)}
                    for volume in phase.volumes
                ],
            }
            for phase in estimate.phases
        },
    }


def exchange_seconds(
    volumes: tuple[Volume, ...], layout: Layout, cluster: Cluster, efficiency: Efficiency
) -> dict[str, float]:
    """Return the seconds of each volume if nothing hid it, its latencies included."""
    result = {}
    for volume in volumes:
        size, stride = group_of(layout, volume.axis)
        per_call = volume.num_bytes / volume.calls if volume.calls else 0.0
        once = cluster.transfer_s(per_call, size, stride, efficiency, volume.is_ring)
        result[volume.name] = once * volume.calls
    return result


def exposed_seconds(
    exchange_s: Mapping[str, float], compute: Mapping[str, float], efficiency: Efficiency
) -> dict[str, float]:
    """Return what of each exchange nothing hides.

    LASP+ runs behind the core of lightning attention, keys and values behind that of softmax
    attention, weights and gradients of FSDP behind all computing, a share of the experts' exchanges
    behind the experts of other tokens. Sums of tensor parallelism hide behind nothing.

    Args:
        exchange_s: seconds of each exchange.
        compute: seconds of each part of the computing.
        efficiency: how much of the computing hides anything, and of the experts' exchanges.
    """
    hiding = {part: seconds * efficiency.overlap for part, seconds in compute.items()}
    behind = {
        "expert all-to-all": hiding.get("experts", 0.0),
        "expert width": hiding.get("experts", 0.0),
        "LASP+ states": hiding.get("lightning attention", 0.0),
        "keys and values": hiding.get("softmax attention", 0.0),
    }
    free = sum(hiding.values())
    sharding = 0.0
    result: dict[str, float] = {}
    for name, seconds in exchange_s.items():
        if name.startswith("FSDP"):
            sharding += seconds
            continue
        most = seconds * efficiency.hidden_dispatch if name.startswith("expert") else seconds
        hidden = min(most, behind.get(name, 0.0))
        free -= hidden  # FSDP has the links only while they are not in use
        result[name] = seconds - hidden
    if sharding:
        result["FSDP weights and gradients"] = max(0.0, sharding - max(0.0, free))
    return result
