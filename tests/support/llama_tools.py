"""llama.cpp's own programs, called bare: what our results are measured against."""

from __future__ import annotations

import hashlib
import re
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.toolchain.probe import COUNTER, NEEDED, Toolchain
from support.command_line import clean_environment

_CHUNK = re.compile(r"\[(\d+)\]([\d.]+),")


@dataclass(frozen=True)
class BareTools:
    """The programs of one toolchain."""

    toolchain: Toolchain

    def quantize(
        self, model: Path, out: Path, ftype: str, *options: str, imatrix: Path | None = None, folder: Path | None = None
    ) -> Path:
        """llama-quantize in the imatrix's directory with its bare name, as the path goes into the output's metadata."""
        done = self.call_quantize(model, out, ftype, *options, imatrix=imatrix, folder=folder)
        assert done.returncode == 0, done.stderr.decode()
        return out

    def call_quantize(
        self, model: Path, out: Path, ftype: str, *options: str, imatrix: Path | None = None, folder: Path | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """The same, however it ends."""
        out.parent.mkdir(parents=True, exist_ok=True)
        given = ["--imatrix", imatrix.name] if imatrix is not None else []
        cwd = folder or (imatrix.parent if imatrix is not None else None)
        return self._call("llama-quantize", *options, *given, str(model), str(out), ftype, cwd=cwd)

    def imatrix(self, model: Path, text: Path, out: Path, *options: str, folder: Path | None = None) -> dict[int, str]:
        """llama-imatrix in one run without mid-run saves, in ``folder``: the path of the text goes into the file as it is
        given. Returns the perplexities it printed after each number of chunks (not of the last ones, where its asynchronous
        log lost those lines)."""
        out.parent.mkdir(parents=True, exist_ok=True)
        files = ("-m", str(model), "-f", str(text), "-o", str(out))
        told = self._run("llama-imatrix", *files, "--output-frequency", "1000000000", *options, cwd=folder)
        return {int(chunks): ppl for chunks, ppl in _CHUNK.findall(told)}

    def merge(self, files: Sequence[Path], out: Path, *options: str) -> Path:
        """llama-imatrix's own sum of imatrices; it wants a model's name, but opens none."""
        given = [argument for file in files for argument in ("--in-file", str(file))]
        self._run("llama-imatrix", *given, "-m", "unused", "-o", str(out), *options)
        return out

    def try_quantize(self, model: Path, out: Path, ftype: str, *options: str, imatrix: Path) -> tuple[int, str]:
        """How :meth:`call_quantize` ends and what it says, good or bad."""
        done = self.call_quantize(model, out, ftype, *options, imatrix=imatrix)
        return done.returncode, (done.stdout + done.stderr).decode()

    def split(self, model: Path, prefix: Path, max_tensors: int = 128, *, max_size: str = "") -> list[Path]:
        """Shards of a model, in order; ``max_size`` such as ``2M`` in place of a number of tensors."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        limit = ("--split-max-size", max_size) if max_size else ("--split-max-tensors", str(max_tensors))
        self._run("llama-gguf-split", "--split", *limit, str(model), str(prefix))
        return sorted(prefix.parent.glob(f"{prefix.name}-*-of-*.gguf"))

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        done = self._call(tool, *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def _call(self, tool: str, *arguments: str, cwd: Path | None) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [self.toolchain.tool(tool), *arguments],
            cwd=cwd,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
            check=False,
        )


WORK_ONLY = """
case " $* " in *" --help "*|*" --version "*|*" --list-devices "*|*" --dry-run "*) exec "$real" "$@";; esac
for word in "$@"; do
    if [ "$last" = "$out" ]; then type=$word; fi
    case "$word" in *.gguf) out=$word;; esac
    last=$word
done
"""
"""For :func:`fake_tools`: questions and dry runs go to the real program; sets ``$out`` (output file) and ``$type`` (ftype)."""


def fake_tools(toolchain: Toolchain, folder: Path, **scripts: str) -> Path:
    """A toolchain of links to real programs, but for those that are replaced by an ``sh`` script (``llama_quantize="…"``).

    The script finds the program it stands for in ``$real``, and ends in that if it does not end before.
    """
    folder.mkdir(parents=True)
    for tool in (*NEEDED, COUNTER):
        (folder / tool).symlink_to(toolchain.tool(tool))
    for name, script in scripts.items():
        program = folder / name.replace("_", "-")
        real = program.readlink()
        program.unlink()
        program.write_text(f'#!/bin/sh\nreal=\'{real}\'\n{script}\nexec "$real" "$@"\n', encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def levels_in(workspace: Path) -> dict[str, str]:
    """Level name -> digest of each finished file in a workspace."""
    model = workspace.name
    return {path.stem.removeprefix(f"{model}-"): digest(path) for path in sorted(workspace.glob(f"{model}-*.gguf"))}


def leftovers(workspace: Path) -> list[str]:
    """What may not remain in a workspace when nothing runs: half files, parts, owners. Ledgers of finished levels may."""
    if not workspace.is_dir():
        return []
    kept = {".lock", ".ledgers"}
    return sorted(entry.name for entry in workspace.iterdir() if entry.name.startswith(".") and entry.name not in kept)


def times(paths: Sequence[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in paths}
