"""llama-perplexity as it is, but for what a test wants of it."""

from __future__ import annotations

import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import clean_environment

PATIENT = """
case " $* " in
*" --kl-divergence "*)
    while :; do
        told=$("$real" "$@") || exit
        case "$told" in *"Same top p: "*) printf '%s\\n' "$told"; exit 0;; esac
    done;;
esac
exec "$real" "$@"
"""
"""Asked until it tells its whole summary: on a busy machine a run over a tiny model often loses the end of it."""


def perplexity_that(does: str, toolchain: Toolchain, folder: Path) -> Toolchain:
    """The toolchain with the ``sh`` script ``does`` for its llama-perplexity; it finds the real one in ``$real``."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "llama-perplexity"
    program.write_text(f"#!/bin/sh\nreal='{toolchain.tool('llama-perplexity')}'\nhere='{folder}'\n{does}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return replace(toolchain, tools={**toolchain.tools, "llama-perplexity": program})


def perplexity_of(toolchain: Toolchain, model: Path, text: Path, *options: str) -> float:
    """llama-perplexity's estimate; asked again while its asynchronous log loses the line."""
    argv = [str(toolchain.tool("llama-perplexity")), "-m", str(model), "-f", str(text), "-t", "1", *options]
    for _ in range(20):
        done = subprocess.run(argv, env=clean_environment(), capture_output=True, text=True, check=True, timeout=300)
        if found := re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr):
            return float(found[1])
    raise AssertionError("llama-perplexity reported no perplexity in 20 runs")
