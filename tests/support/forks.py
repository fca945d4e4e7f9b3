"""A stand-in for ik_llama.cpp: llama.cpp's real programs behind wrappers that read and write the legacy imatrix only.

As that fork's do, llama-quantize refuses a GGUF matrix with the words of its legacy reader and offers a type that nobody else
knows: IQ4_K, here with the bytes of IQ4_NL under another number. llama-imatrix has no ``--output-format``.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path

from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.toolchain.probe import Toolchain
from support.llama_tools import fake_tools

OWN, AS, OWN_ID, AS_ID = "IQ4_K", "IQ4_NL", 139, 20

_QUANTIZE = """\
import struct, subprocess, sys

PLANS, OWN, AS = {plans!r}, {own!r}, {as_!r}
args = sys.argv[1:]
if "--help" in args:
    text = subprocess.run([{real!r}, "--help"], capture_output=True, text=True).stdout
    print(text if PLANS else text.replace("--dry-run", "").replace("llama-quantize  model", ""))
    print("  140  or  IQ4_K   :  4.5 bpw non-linear quantization")
    sys.exit(1)
if "--dry-run" in args and not PLANS:
    print("usage: llama-quantize [--imatrix] model-f32.gguf [model-quant.gguf] type [nthreads]")
    sys.exit(1)
if "--imatrix" in args:
    name = args[args.index("--imatrix") + 1]
    with open(name, "rb") as file:
        if file.read(4) == b"GGUF":
            print(f"load_imatrix: failed reading data for entry 0 from {{name}}")
            sys.exit(1)
own = OWN in args
done = subprocess.run([{real!r}, *(AS if word == OWN else word for word in args)], capture_output=True)
for stream, data in ((sys.stdout, done.stdout), (sys.stderr, done.stderr)):
    stream.buffer.write(data.replace(AS.lower().encode(), OWN.lower().encode()) if own else data)
if own and done.returncode == 0 and "--dry-run" not in args:
    sys.path.insert(0, {tests!r})
    from support.forks import rename_type
    from pathlib import Path

    rename_type(Path(args[args.index(OWN) - 1]))
sys.exit(done.returncode)
"""
_IMATRIX = """\
import subprocess, sys

args = sys.argv[1:]
if "--help" in args:
    text = subprocess.run([{real!r}, "--help"], capture_output=True, text=True).stdout
    print(text.replace("--output-format {{gguf,dat}}", "").replace("imatrix.gguf", "imatrix.dat"))
    sys.exit(0)
format = ["--output-format", "dat"] if "-m" in args else []
sys.exit(subprocess.run([{real!r}, *args, *format]).returncode)
"""


def legacy_fork(toolchain: Toolchain, folder: Path, *, plans: bool = True) -> Path:
    """A directory of such programs; without ``plans`` its llama-quantize has no ``--dry-run``, as in 2024."""
    fake_tools(toolchain, folder)
    tests = str(Path(__file__).parent.parent)
    for name, script in (("llama-quantize", _QUANTIZE), ("llama-imatrix", _IMATRIX)):
        program = folder / name
        real = str(program.readlink())
        program.unlink()
        body = script.format(real=real, plans=plans, own=OWN, as_=AS, tests=tests)
        program.write_text(f"#!{sys.executable}\n{body}", encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def rename_type(path: Path) -> Path:
    """Give a file's IQ4_NL tensors the number of the fork's type."""
    data = bytearray(path.read_bytes())
    for tensor in read_header(path).tensors:
        if tensor.type == AS_ID:
            entry = tensor.name.encode() + len(tensor.shape).to_bytes(4, "little")
            at = data.index(entry) + len(entry) + 8 * len(tensor.shape)
            data[at : at + 4] = OWN_ID.to_bytes(4, "little")
    path.write_bytes(data)
    return path
