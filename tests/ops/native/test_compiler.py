import os
import shutil
import subprocess
import sys

import pytest

from linnet.ops import native
from linnet.ops.native import compiler


@pytest.mark.parametrize("expected", ["amx", "avx512", "avx2", "portable"])
def test_the_best_level_that_runs_is_detected(expected, monkeypatch):
    monkeypatch.setattr(compiler, "_cpu_features", lambda: compiler._REQUIRED[expected])
    assert compiler.detect_level() == expected


def test_the_amx_level_compiles(monkeypatch, tmp_path):
    # Most machines cannot run it.
    probe = [compiler._compiler(), *compiler._FLAGS["amx"], "-fsyntax-only", "-xc++", "/dev/null"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("the compiler does not know AMX")
    monkeypatch.setattr(compiler, "_COMMON_FLAGS", (*compiler._COMMON_FLAGS, "-O0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.build("amx").exists()


def test_tiles_that_the_system_refuses_are_reported(monkeypatch, caplog):
    class Kernels:
        def linnet_has_tiles(self):
            return 0

    monkeypatch.setattr(native, "requested_level", lambda: "amx")
    monkeypatch.setattr(native, "build", lambda level: "kernels.so")
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: Kernels())
    native.library.cache_clear()
    try:
        assert isinstance(native.library(), Kernels)
    finally:
        native.library.cache_clear()
    assert "refuses AMX tiles" in caplog.text


COMPILER = """#!/bin/sh
[ "$1" = --version ] && exit 0
echo called >> "{log}"
sleep 0.5
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def test_processes_that_start_at_once_compile_once(tmp_path):
    script, log = tmp_path / "c++", tmp_path / "log"
    script.write_text(COMPILER.format(log=log))
    script.chmod(0o700)
    environment = {**os.environ, "CXX": str(script), "XDG_CACHE_HOME": str(tmp_path)}
    program = "from linnet.ops.native.compiler import build; print(build('portable').read_text())"
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in started] == [b"library"] * 3
    assert log.read_text() == "called\n"


def test_name_depends_on_the_sources_and_not_on_their_place(monkeypatch, tmp_path):
    before = compiler._fingerprint(["g++", "-O3"])
    copy = shutil.copytree(compiler.SOURCES, tmp_path / "src")
    monkeypatch.setattr(compiler, "SOURCES", copy)
    assert compiler._fingerprint(["g++", "-O3"]) == before
    assert compiler._fingerprint(["g++", "-O2"]) != before
    (copy / "lightning.cpp").write_text("")
    assert compiler._fingerprint(["g++", "-O3"]) != before
