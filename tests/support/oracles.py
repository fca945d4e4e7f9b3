"""What llama-quantize makes of the same inputs, made once: its words and its files' digests are kept in the user's cache.

With an empty cache everything is made. An entry is named by all that decides a byte: the programs and their libraries, the
processor, the model with its shards, the imatrix and its name, the options.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec

from imatrix_runner.engines.jobs import QuantizeJob, QuantizeOptions
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.toolchain.hardware import cpu_features
from imatrix_runner.toolchain.store import cache_dir
from support.llama_library import quantize_in_one_process
from support.llama_tools import BareTools, digest


class File(msgspec.Struct, frozen=True):
    """A file that llama-quantize wrote. ``tensors``: of each the name, type, shape and bytes; empty if their directory is
    inconsistent (llama-quantize keeps the key of another alignment, and pads to 32 all the same)."""

    digest: str
    size: int
    tensors: list[tuple[str, str, tuple[int, ...], int | None]]


class Oracle(msgspec.Struct, frozen=True):
    """How one llama-quantize ended, what it said (bytes that are no text are replaced), and its files in order (none if it
    failed)."""

    code: int
    out: str
    err: str
    files: list[File]

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def digests(self) -> list[str]:
        assert self.code == 0, self.err
        return [file.digest for file in self.files]


def quantized(tools: BareTools, model: Path, ftype: str, *options: str, imatrix: Path | None = None) -> Oracle:
    """One level of ``model``, by llama-quantize called as :meth:`BareTools.quantize` calls it."""
    entry = _entry(tools, model, ftype, options, imatrix)
    if entry.is_file():
        return msgspec.json.decode(entry.read_bytes(), type=Oracle)
    made = _make(tools, model, ftype, options, imatrix)
    if made.code != 0:  # then it loses its last words now and then, and they are the reason
        made = max((made, *(_make(tools, model, ftype, options, imatrix) for _ in range(2))), key=lambda each: len(each.said))
    _remember(entry, made)
    return made


def library_digests(tools: BareTools, jobs: Sequence[QuantizeJob]) -> list[str]:
    """The digest of each job's file by llama.cpp's own ``llama_model_quantize``: what is not known yet is made in one process,
    with one thread. The jobs have imatrices, and no options but ``allow_requantize``."""
    entries = []
    for job in jobs:
        assert job.options == QuantizeOptions(allow_requantize=job.options.allow_requantize)
        words = ("llama_model_quantize", str(job.options.allow_requantize))
        entries.append(_entry(tools, job.source, job.ftype, words, job.imatrix))
    unknown = [(entry, job) for entry, job in zip(entries, jobs, strict=True) if not entry.is_file()]
    if unknown:
        with tempfile.TemporaryDirectory(prefix="imatrix-runner-oracle-") as folder:
            made = [replace(job, out=Path(folder, f"{number}.gguf")) for number, (_, job) in enumerate(unknown)]
            quantize_in_one_process(tools.toolchain, made, Path(folder, "jobs.json"))
            for (entry, _), job in zip(unknown, made, strict=True):
                _remember(entry, digest(job.out))
    return [msgspec.json.decode(entry.read_bytes(), type=str) for entry in entries]


def _remember(entry: Path, made: Oracle | str) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
        file.write(msgspec.json.encode(made))
    Path(file.name).replace(entry)


def _make(tools: BareTools, model: Path, ftype: str, options: tuple[str, ...], imatrix: Path | None) -> Oracle:
    with tempfile.TemporaryDirectory(prefix="imatrix-runner-oracle-") as folder:
        done = tools.call_quantize(model, Path(folder, "m.gguf"), ftype, *options, imatrix=imatrix)
        files = [_file(path) for path in sorted(Path(folder).iterdir())] if done.returncode == 0 else []
    return Oracle(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), files)


def _file(path: Path) -> File:
    try:
        tensors = [(tensor.name, tensor.type_name, tensor.shape, tensor.n_bytes) for tensor in read_header(path).tensors]
    except InvalidDataError:
        tensors = []
    return File(digest(path), path.stat().st_size, tensors)


def _entry(tools: BareTools, model: Path, ftype: str, options: tuple[str, ...], imatrix: Path | None) -> Path:
    words = [digest(Path(word)) if Path(word).is_file() else word for word in options]
    programs = _content(tools.toolchain.tool("llama-quantize").parent)
    parts = [tools.toolchain.identity(), programs, cpu_features(), ftype, repr(tuple(words))]
    parts += [digest(file) for file in _files(model)]
    parts += [imatrix.name, digest(imatrix)] if imatrix is not None else []
    return cache_dir() / "tests" / "oracles" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json"


def _files(model: Path) -> Iterator[Path]:
    """The model's shards, or its one file."""
    prefix, parted, _ = model.name.rpartition("-00001-of-")
    yield from sorted(model.parent.glob(f"{prefix}-*-of-*.gguf")) if parted else [model]


@cache
def _content(directory: Path) -> str:
    """Digest of a toolchain's program and libraries."""
    libraries = {path.resolve() for path in directory.iterdir() if ".so" in path.name or path.suffix in (".dylib", ".dll")}
    return ",".join(map(digest, [directory / "llama-quantize", *sorted(libraries)]))
