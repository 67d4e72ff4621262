"""Compile the C++ kernels of this folder, once per machine and level, without a developer's help.

The library goes to the user's cache folder under a name that holds a hash of the sources, the flags
and the compiler, so a changed source or torch never meets a stale library.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from linnet.errors import ConfigError

logger = logging.getLogger(__name__)

# In order of preference; what stands after "portable" runs only when it is asked for.
Level = Literal["amx", "avx512", "avx2", "portable", "amx-emulated"]

SOURCES = Path(__file__).parent / "src"

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_REQUIRED: dict[Level, set[str]] = {
    "amx": {*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512": {*_AVX512},
    "avx2": {"avx2", "fma"},
    "portable": set(),
    "amx-emulated": {*_AVX512},  # the kernels of "amx" with tile products in plain loops, for tests
}
_FLAGS: dict[Level, tuple[str, ...]] = {
    "amx": ("-march=skylake-avx512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512": ("-march=skylake-avx512",),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
    # -O2 compiles in half the time of -O3, and only tests wait for the emulation.
    "amx-emulated": ("-march=skylake-avx512", "-DLINNET_EMULATE_TILES", "-O2"),
}
# -ffast-math would fold the checks for NaN away.
_COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-Wall")


class BuildError(Exception):
    """The kernels could not be compiled; the message says why."""


def detect_level() -> Level:
    """Return the best level that this processor runs."""
    features = _cpu_features()
    return next(level for level in get_args(Level) if features.issuperset(_REQUIRED[level]))


def requested_level() -> Level | None:
    """Return the level that LINNET_CPU_LEVEL asks for, the detected one if unset, None if "off".

    Raises:
        ConfigError: the variable names no level, or one that this processor cannot run.
    """
    name = os.environ.get("LINNET_CPU_LEVEL", "")
    if not name:
        return detect_level()
    if name == "off":
        return None
    if name not in get_args(Level):
        raise ConfigError(
            f"LINNET_CPU_LEVEL is {name!r}; expected one of {', '.join(get_args(Level))} or off"
        )
    level = cast(Level, name)
    if missing := sorted(_REQUIRED[level] - _cpu_features()):
        raise ConfigError(
            f"LINNET_CPU_LEVEL is {name!r}, but this processor has no {', '.join(missing)}"
        )
    return level


def build(level: Level) -> Path:
    """Return the compiled library of a level, compiling it if it is not there yet.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = _compiler()
    command = [compiler, *_COMMON_FLAGS, *_FLAGS[level]]
    openmp = _openmp_library()
    path = _cache_folder() / f"kernels-{level}-{_fingerprint([*command, *openmp])}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(path.with_suffix(".lock")):
            if not path.exists():  # nobody built it while this process waited
                logger.warning(
                    "compiling the native CPU kernels for %s, once (about a minute)", level
                )
                sources = map(str, sorted(SOURCES.glob("*.cpp")))
                _compile(command, [*sources, *openmp], path)
    return path


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait for other processes, such as the ranks of this machine; the system lets go at a kill."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            logger.info("%s cannot be locked; several processes may compile", lock)
        yield


def _compile(command: list[str], inputs: list[str], path: Path) -> None:
    # A name of its own and a rename: a process that is killed leaves no half library.
    handle, partial = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", partial, *inputs], capture_output=True, text=True)
        if done.returncode:
            first = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr[:200])
            raise BuildError(f"{command[0]} failed: {first.strip()}")
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _cpu_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(x.split(":")[1].split()) for x in lines if x.startswith("flags")), set())


def _compiler() -> str:
    if platform.system() != "Linux":
        raise BuildError(f"native kernels are built on Linux only, not on {platform.system()}")
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler was found; install g++ for the fast CPU kernels")


def _openmp_library() -> list[str]:
    """Return the OpenMP library that torch loads: another one would be a second thread pool."""
    folder = Path(torch.__file__).parent / "lib"
    return [str(path) for path in sorted(folder.glob("libgomp*.so*"))[:1]]


def _fingerprint(command: list[str]) -> str:
    """Hash what the library depends on, but not where it lies: clones share what one compiled."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    names = [Path(word).name for word in command]
    digest = hashlib.sha256("\0".join([*names, version]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "linnet"
