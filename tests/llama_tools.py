"""llama.cpp's own programs, called bare: what our results are measured against."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import clean_environment

from imatrix_runner.toolchain.probe import NEEDED, Toolchain

_FINAL = re.compile(r"Final estimate: PPL = ([\d.]+)")
_CHUNK = re.compile(r"\[(\d+)\]([\d.]+),")


@dataclass(frozen=True)
class BareTools:
    """The programs of one toolchain."""

    toolchain: Toolchain

    def quantize(
        self, model: Path, out: Path, ftype: str, *options: str, imatrix: Path | None = None, folder: Path | None = None
    ) -> Path:
        """llama-quantize in the imatrix's directory with its bare name, as the path goes into the output's metadata."""
        out.parent.mkdir(parents=True, exist_ok=True)
        given = ["--imatrix", imatrix.name] if imatrix is not None else []
        cwd = folder or (imatrix.parent if imatrix is not None else None)
        self._run("llama-quantize", *options, *given, str(model), str(out), ftype, cwd=cwd)
        return out

    def imatrix(self, model: Path, text: Path, out: Path, *options: str) -> float | None:
        """llama-imatrix in one run without mid-run saves; returns its perplexity (the last chunk's, if the tool's
        asynchronous log lost the final line)."""
        out.parent.mkdir(parents=True, exist_ok=True)
        files = ("-m", str(model), "-f", str(text), "-o", str(out))
        told = self._run("llama-imatrix", *files, "--output-frequency", "1000000000", *options)
        final, chunks = _FINAL.search(told), _CHUNK.findall(told)
        return float(final[1] if final else chunks[-1][1]) if final or chunks else None

    def split(self, model: Path, prefix: Path, max_tensors: int) -> list[Path]:
        """Shards of a model, in order."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._run("llama-gguf-split", "--split", "--split-max-tensors", str(max_tensors), str(model), str(prefix))
        return sorted(prefix.parent.glob(f"{prefix.name}-*-of-*.gguf"))

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [self.toolchain.tool(tool), *arguments],
            cwd=cwd,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


def fake_quantize(toolchain: Toolchain, folder: Path, script: str) -> Path:
    """A toolchain whose ``llama-quantize`` is ours and whose other programs are links to the real ones.

    ``script`` (of ``sh``) runs for real work only, questions and dry runs go to the real program. It may use ``$real``,
    ``$out`` (the output file) and ``$type`` (the ftype), and ends by itself or falls through to the real program.
    """
    folder.mkdir(parents=True)
    for tool in NEEDED:
        (folder / tool).symlink_to(toolchain.tool(tool))
    program = folder / "llama-quantize"
    program.unlink()
    lines = [
        "#!/bin/sh",
        f"real='{toolchain.tool('llama-quantize')}'",
        'case " $* " in *" --help "*|*" --version "*|*" --dry-run "*) exec "$real" "$@";; esac',
        'for word in "$@"; do case "$word" in *.gguf) out=$word;; esac; done',
        'for type in "$@"; do if [ -n "$next" ]; then break; fi; if [ "$type" = "$out" ]; then next=1; fi; done',
        script,
        'exec "$real" "$@"',
    ]
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def levels_in(workspace: Path) -> dict[str, str]:
    """Level name -> digest of each finished file in a workspace."""
    model = workspace.name
    return {path.stem.removeprefix(f"{model}-"): digest(path) for path in sorted(workspace.glob(f"{model}-*.gguf"))}


def leftovers(workspace: Path) -> list[str]:
    """What may not remain in a workspace when nothing runs: half files, parts, owners."""
    if not workspace.is_dir():
        return []
    kept = {".lock"}
    return sorted(entry.name for entry in workspace.iterdir() if entry.name.startswith(".") and entry.name not in kept)


def times(paths: Sequence[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in paths}


def copy_of(file: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(file, folder / file.name))


def can_mount() -> bool:
    """Whether this process may mount file systems (root outside a locked-down container)."""
    return os.name == "posix" and os.geteuid() == 0 and shutil.which("mount") is not None
