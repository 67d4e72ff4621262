"""What holds for every test: no uninitialized memory, no network, one thread, fixed seeds."""

import functools
import random
import socket
from collections.abc import Callable, Iterator

import pytest
import torch

_LOCAL = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Do not share the work of a tiny model: on busy cores each part waits for the other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that reading unwritten memory fails a test."""
    # `with torch.device(...)` remembers the originals at its first use; after the patch it would
    # remember the replacements, and leave `torch.empty` on the CPU.
    with torch.device("meta"):
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse connections to other machines; gloo and test servers use the local one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _local_only(getattr(socket.socket, name)))
        yield


def _local_only(connect: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(connect)
    def connect_locally(self: socket.socket, address: object) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0] if isinstance(address, tuple) else address
            if host not in _LOCAL:
                raise RuntimeError(f"a test tried to connect to {host!r}; tests use no network")
        return connect(self, address)

    return connect_locally


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random tensors."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> random.Random:
    """A seeded source of random Python values."""
    return random.Random(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, and in one those that start processes themselves."""
    for item in items:
        folder = item.path.parent.name
        group = folder if folder == "parallel" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the parity tests measured, as a table: layouts by packings of documents."""
    reports = terminalreporter.stats.get("passed", [])
    cells = [value for r in reports for name, value in r.user_properties if name == "parity"]
    if not cells:
        return
    rows = {layout: {} for layout, _, _ in cells}
    for layout, packing, error in cells:
        rows[layout][packing] = f"{error:.0e}"
    packings = sorted({packing for _, packing, _ in cells})
    terminalreporter.section("many ranks against one: largest relative error, loss and gradients")
    width = max(map(len, rows))
    terminalreporter.line(" " * width + "".join(f"{packing:>26}" for packing in packings))
    for layout, row in rows.items():
        values = "".join(f"{row.get(packing, '-'):>26}" for packing in packings)
        terminalreporter.line(f"{layout:<{width}}{values}")
