"""One native build serves both: the Python bindings, installed without libraries of their own, load the toolchain's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from imatrix_runner.toolchain.probe import Toolchain

SCRIPT = """
import llama_cpp
llama_cpp.llama_backend_init()
print(llama_cpp.llama_cpp._lib._name)
print(llama_cpp.llama_print_system_info().decode())
"""


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_the_bindings_run_on_the_toolchain_s_libraries(toolchain: Toolchain) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(toolchain.directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded, system = done.stdout.splitlines()[:2]
    assert loaded.startswith(str(toolchain.directory))
    assert "CPU" in system
