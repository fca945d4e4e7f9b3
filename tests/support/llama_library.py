"""llama.cpp's own ``llama_model_quantize``, called bare in one process for many files: its tables are computed only once.

Slow types take seconds for their tables in every process, llama-quantize included, so that comparing all of them with the
program for every source would take minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE
from imatrix_runner.engines.jobs import QuantizeJob
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import clean_environment

_SCRIPT = """
import ctypes, json, sys
from pathlib import Path
import llama_cpp.llama_cpp as llama
from imatrix_runner.engines.files.imatrix_weights import read_weights
from imatrix_runner.engines.worker.quantize.overrides import imatrix_overrides
llama.llama_backend_init()
for source, out, ftype, requantize, imatrix in json.loads(Path(sys.argv[1]).read_text()):
    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype, parameters.allow_requantize = 1, ftype, requantize
    weights = read_weights(Path(imatrix))
    values = dict(weights.values)
    entries = (llama.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, each) in zip(entries, values.items()):
        entry.name, entry.data, entry.size = name, each.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), each.size
    told = imatrix_overrides(Path(imatrix).name, weights)
    overrides = (llama.llama_model_kv_override * (len(told) + 1))()
    for override, (key, value) in zip(overrides, ((each.key, each.value) for each in told)):
        override.key = key
        if isinstance(value, int):
            override.tag, override.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            override.tag, override.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, value
    parameters.imatrix, parameters.kv_overrides = entries, overrides
    assert llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)) == 0, out
"""


def quantize_in_one_process(toolchain: Toolchain, jobs: Sequence[QuantizeJob], file: Path) -> None:
    """Write the output of every job (they go through ``file``), each with an imatrix and one thread."""
    numbers = {kind.name: kind.number for kind in toolchain.types}
    asked = [
        (str(job.source), str(job.out), numbers[job.ftype], job.options.allow_requantize, str(job.imatrix)) for job in jobs
    ]
    file.write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, file],
        env=clean_environment({LIBRARY_VARIABLE: str(toolchain.directory)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
