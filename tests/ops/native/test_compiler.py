import subprocess

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
