"""Real vocabularies and chat templates: what llama.cpp tests itself with, out of llama-cpp-python's source distribution."""

from __future__ import annotations

import tarfile
from pathlib import Path

import filelock

from imatrix_runner.events import ignore
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.source import TESTED_VERSION, fetch_sdist
from imatrix_runner.toolchain.store import Store, cache_dir

VOCABULARIES = ("llama-bpe", "llama-spm", "qwen2", "gpt-2", "gemma-4", "phi-3", "command-r")
"""128k BPE with BOS, SentencePiece with its space, 152k BPE without BOS, and other ways to split a text."""


def fetch_llama_models() -> Path:
    """llama.cpp's folder ``models``: ``ggml-vocab-*.gguf`` and ``templates/*.jinja``; cached by the archive's hash."""
    store = Store(cache_dir())
    source = fetch_sdist(TESTED_VERSION, store, Runner(), ignore)
    assert source.archive is not None
    folder = cache_dir() / "tests" / f"models-{source.sha256[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            _extract(source.archive, part)
            part.rename(folder)
    return folder


def _extract(archive: Path, into: Path) -> None:
    wanted = tuple(f"ggml-vocab-{name}.gguf" for name in VOCABULARIES)
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            _, found, name = member.name.partition("/vendor/llama.cpp/models/")
            if found and member.isfile() and (name in wanted or name.startswith("templates/")):
                content = tar.extractfile(member)
                assert content is not None
                target = into / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
