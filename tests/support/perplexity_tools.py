"""llama-perplexity as it is, but for what a test wants of it."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

from imatrix_runner.toolchain.probe import Toolchain

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
