"""Selects the files of a folder that are documents: those written by people, not those left there by tools."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

MAX_FILE = 1 << 20
"""Upper bound, in bytes, for a file of a folder that is read; longer ones are rarely written by hand."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DATA = _words(".jsonl .ndjson .json .csv .tsv .parquet")
"""Suffixes of files that contain many documents."""

PROSE = _words(".txt .text .utf8 .raw .md .markdown .rst .adoc .org .tex")
"""Suffixes of texts that are split at paragraphs."""

CODE = _words(
    """
    .asm .awk .bash .bat .c .cc .cfg .clj .cljs .cmake .conf .cpp .cs .css .cu .cuh .cxx .dart .el .erl .ex .exs .f90 .fish .fs
    .go .gradle .groovy .h .hh .hpp .hrl .hs .html .hxx .ini .java .jl .js .jsx .kt .kts .less .lisp .lua .m .metal .mjs .mk .ml
    .mli .mm .nim .nix .php .pl .pm .proto .ps1 .py .pyi .r .rb .rs .s .sass .scala .scm .scss .sh .sql .svelte .swift .tf .toml
    .ts .tsx .v .vb .vhd .vhdl .vue .xml .yaml .yml .zig .zsh
    """
)
"""Suffixes of source code and configuration."""

_ABOUT_DATA = _words("readme license licence dataset_info dataset_infos")
_FOLDERS = _words(
    "__pycache__ bower_components build dist node_modules site-packages target third_party third-party vendor vendored venv"
)
_LOCKS = _words(
    "package-lock.json npm-shrinkwrap.json pnpm-lock.yaml go.sum bun.lockb packages.lock.json gradle.lockfile mix.lock"
)
_GENERATED = (".min.js", ".min.css", ".min.mjs", ".bundle.js", ".map", ".pb.go", "_pb2.py")
_BINARY = _words(
    """
    .7z .a .avi .avif .bin .bmp .bz2 .class .db .dll .doc .docx .dylib .eot .exe .flac .gguf .gif .gz .h5 .ico .jar .jpeg .jpg
    .ko .lib .mkv .mov .mp3 .mp4 .npy .npz .o .obj .odt .ogg .onnx .otf .parquet .pdf .pkl .png .pptx .pt .pth .pyc .pyd .rar
    .safetensors .so .sqlite .sqlite3 .tar .tgz .tif .tiff .ttf .wasm .wav .webm .webp .whl .woff .woff2 .xls .xlsx .xz .zip
    .zst
    """
)
_ENTER = "folder"


@dataclass(frozen=True)
class FolderEntry:
    """One file below a folder: its path, its path relative to the folder (with slashes), its size in bytes, and why it is
    skipped (empty if it is read)."""

    path: Path
    inside: str
    size: int
    why: str = ""


def suffix(path: PurePath) -> str:
    """The suffix in lower case; for a ``.gz``, that of the compressed file."""
    return (PurePath(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def is_dataset(folder: Path) -> bool:
    """Whether a folder contains only data files, and files that describe them."""
    found = False
    for entry in _walk(folder):
        if entry.why or PurePath(entry.inside).stem.lower() in _ABOUT_DATA:
            continue
        if suffix(entry.path) not in DATA:
            return False
        found = True
    return found


def documents(folder: Path, *, dataset: bool) -> Iterator[FolderEntry]:
    """All files below ``folder``, in the order of their names. ``why`` is empty for those to read: data files if ``dataset``,
    else texts and source code."""
    for entry in _walk(folder):
        why = entry.why or (_not_data(entry) if dataset else _unwritten(entry))
        yield FolderEntry(entry.path, entry.inside, entry.size, why)


def _not_data(entry: FolderEntry) -> str:
    return "" if suffix(entry.path) in DATA and PurePath(entry.inside).stem.lower() not in _ABOUT_DATA else "not data"


def _unwritten(entry: FolderEntry) -> str:
    """Why a file is not a text written by people, judging by its name and size; empty if it may be one."""
    name = entry.path.name.lower()
    if PurePath(name).suffix in _BINARY:
        return "binary"
    if name in _LOCKS or name.endswith(".lock"):
        return "lock file"
    if name.endswith(_GENERATED):
        return "generated"
    if entry.size > MAX_FILE:
        return "too large"
    return "" if entry.size else "empty"


def _walk(folder: Path) -> Iterator[FolderEntry]:
    """All entries that are not folders, and the folders that are not entered, with the reason.

    Links are never followed: a target inside the folder is found at its own place, and the user did not name anything outside.
    """
    waiting = _listed(folder, "")[::-1]
    while waiting:
        entry = waiting.pop()
        if entry.why != _ENTER:
            yield entry
            continue
        try:
            waiting += _listed(entry.path, entry.inside + "/")[::-1]
        except OSError:
            yield FolderEntry(entry.path, entry.inside, 0, "unreadable")


def _listed(folder: Path, inside: str) -> list[FolderEntry]:
    with os.scandir(folder) as entries:
        return [_entry(entry, folder, inside) for entry in sorted(entries, key=lambda entry: entry.name)]


def _entry(entry: os.DirEntry[str], folder: Path, inside: str) -> FolderEntry:
    why, size = "", 0
    if entry.name.startswith("."):
        why = "hidden"
    elif entry.is_symlink():
        why = "link"
    elif entry.is_dir(follow_symlinks=False):
        why = "built or installed" if entry.name.lower() in _FOLDERS or entry.name.endswith(".egg-info") else _ENTER
    elif not entry.is_file(follow_symlinks=False):
        why = "not a regular file"
    else:
        try:
            size = entry.stat(follow_symlinks=False).st_size
        except OSError:
            why = "unreadable"
    return FolderEntry(folder / entry.name, inside + entry.name, size, why)
