"""GPUs, how they are linked, and how much of their peak is reached: all that a plan assumes.

Peaks are the vendor's dense figures of the SXM parts; memory is what the driver reports. Every
number can be replaced.
"""

import dataclasses
import math
import re
from dataclasses import dataclass

from linnet.config import nearest
from linnet.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU and its links.

    Raises:
        ConfigError: a number is not positive.
    """

    name: str
    memory_gib: float
    """What the driver reports."""
    tflops: float
    """Dense bf16, 10^12 FLOP/s."""
    fp32_tflops: float
    """fp32 without tensor cores, in which the LM head of training runs."""
    hbm_gbs: float
    """Memory bandwidth, 10^9 bytes/s."""
    node_gbs: float
    """To the other GPUs of the node, one way, 10^9 bytes/s."""
    network_gbs: float = 50.0
    """To other nodes, one way and per GPU, 10^9 bytes/s."""
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not 0 < value < float("inf"):
                raise ConfigError(f"{field.name} of {self.name} is {value}; it must be positive")


_HOPPER = Device(
    name="H100", memory_gib=79.1, tflops=989, fp32_tflops=67, hbm_gbs=3350, node_gbs=450
)
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="A100-80G",
            memory_gib=79.2,
            tflops=312,
            fp32_tflops=19.5,
            hbm_gbs=2039,
            node_gbs=300,
            network_gbs=25.0,
        ),
        _HOPPER,
        # An H100 whose NVLink is cut from 900 to 400 GB/s, both ways together.
        dataclasses.replace(_HOPPER, name="H800", node_gbs=200),
        dataclasses.replace(_HOPPER, name="H200", memory_gib=139.8, hbm_gbs=4800),
        dataclasses.replace(
            _HOPPER, name="H20", memory_gib=95.2, tflops=148, fp32_tflops=44, hbm_gbs=4000
        ),
        Device(
            name="B200",
            memory_gib=178.3,
            tflops=2250,
            fp32_tflops=75,
            hbm_gbs=7700,
            node_gbs=900,
        ),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Shares of the peaks that are reached, and what is hidden behind what: assumptions.

    Raises:
        ConfigError: a share is not in (0, 1].
    """

    matmul: float = 0.6
    """Of the bf16 peak: projections of attention."""
    experts: float = 0.5
    """Of the bf16 peak: grouped products."""
    softmax: float = 0.5
    """Of the bf16 peak: the core of softmax attention."""
    lightning: float = 0.2
    """Of the bf16 peak: the core of lightning attention."""
    head: float = 0.7
    """Of the fp32 peak: the LM head in training."""
    hbm: float = 0.8
    links: float = 0.75
    memory: float = 0.95
    """Of the memory; the rest is for the CUDA context, NCCL buffers and fragmentation."""
    overlap: float = 0.7
    """Share of the time of computing in which exchanges that it hides make progress."""
    hidden_dispatch: float = 0.5
    """Share of the experts' exchanges that runs behind the experts of other groups of tokens
    (MiniMax-01, section 3.1, reports -50%)."""
    expert_balance: float = 0.9
    """Rows of the mean expert rank over those of the fullest."""
    node_latency_us: float = 8.0
    network_latency_us: float = 25.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 < value <= (1e6 if field.name.endswith("_us") else 1):
                raise ConfigError(f"efficiency {field.name} is {value}; it must be in (0, 1]")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal GPUs in equal nodes."""

    num_gpus: int
    device: Device

    def __post_init__(self) -> None:
        per_node = self.device.gpus_per_node
        if self.num_gpus < 1 or (self.num_gpus > per_node and self.num_gpus % per_node):
            raise ConfigError(
                f"{self.num_gpus} GPUs do not fill nodes of {per_node}; "
                "say --gpus NODESxGPUSxNAME or --gpus-per-node"
            )

    def __str__(self) -> str:
        return f"{self.num_gpus:,} x {self.device.name}"

    def transfer_s(
        self, num_bytes: float, size: int, stride: int, efficiency: Efficiency, is_ring: bool = True
    ) -> float:
        """Return the seconds of one exchange.

        Args:
            num_bytes: that each rank receives.
            size: ranks of the group.
            stride: between neighboring ranks of the group in the world.
            efficiency: of the links, and their latency.
            is_ring: gather, scatter and reduction enter a node once and spread within it, on the
                network ports of all its members; an all-to-all is one port per rank.
        """
        if size == 1 or num_bytes <= 0:
            return 0.0
        within = max(1, min(size, self.device.gpus_per_node // stride))
        share = efficiency.links * 1e9
        node_s = num_bytes / (self.device.node_gbs * share) if within > 1 else 0.0
        if within == size:
            return node_s + efficiency.node_latency_us * 1e-6
        outside = num_bytes * (size - within) / (size - 1)
        ports = within if is_ring else 1
        network_s = outside / (self.device.network_gbs * share * ports)
        hops = max(1.0, math.log2(size / within))
        return max(node_s, network_s) + hops * efficiency.network_latency_us * 1e-6


def cluster_of(text: str, **changes: float | int | None) -> Cluster:
    """Read `8xH800`, or `256x8xH800` for 256 nodes of 8.

    Args:
        text: what to read.
        changes: fields of `Device` that replace the known ones; those that are None do not.

    Raises:
        ConfigError: it cannot be read, or the GPU is unknown and not fully described.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([\w.-]+)", text.strip())
    if not match:
        raise ConfigError(f"{text!r} is no number of GPUs; say 8xH800, or 256x8xH800 for nodes")
    nodes, count, name = match.groups()
    given = {key: value for key, value in changes.items() if value is not None}
    if nodes:
        given.setdefault("gpus_per_node", int(count))
    device = _device(name, given)
    return Cluster(int(nodes or 1) * int(count), device)


def _device(name: str, given: dict[str, float | int]) -> Device:
    known = {key.lower(): device for key, device in DEVICES.items()}
    known |= {"a100": known["a100-80g"]}
    if name.lower() in known:
        return dataclasses.replace(known[name.lower()], **given)
    needed = [
        field.name
        for field in dataclasses.fields(Device)
        if field.default is dataclasses.MISSING and field.name not in ("name", *given)
    ]
    if needed:
        options = ", ".join("--" + field.replace("_", "-") for field in needed)
        raise ConfigError(f"GPU {name!r} is unknown{nearest(name, DEVICES)}; or give {options}")
    return Device(name=name, **given)  # pyright: ignore[reportArgumentType]
