"""One pass of the embedded engine, planned as the program plans it, and llama-quantize's own files of the same levels."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE, find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.embedded.native_build import compile_kernels
from imatrix_runner.engines.jobs import (
    Donor,
    DryRun,
    Native,
    PassedLevel,
    PassFigures,
    PassJob,
    PassLevel,
    QuantizeJob,
    QuantizeOptions,
    TensorTarget,
)
from imatrix_runner.engines.levels import resolve_levels
from imatrix_runner.engines.llama_cpp.flags import quantize_options
from imatrix_runner.engines.protocol import Reply, decode_reply, encode_job
from imatrix_runner.events import ignore
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.model import open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.quantize.recipe import make_recipe
from imatrix_runner.quantize.usable_imatrix import usable_weights
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import clean_environment
from support.llama_tools import BareTools, digest
from support.oracles import Oracle, quantized

NO_OPTIONS = QuantizeOptions()
REQUANTIZE = QuantizeOptions(allow_requantize=True)

NEED_WEIGHTS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
"""Levels that cannot be made without an imatrix."""

SLOW = ("IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ3_XXS")
"""Levels whose tables take seconds in every process."""

_SEVERAL = """
import sys
from imatrix_runner.engines.protocol import decode_job, encode
from imatrix_runner.engines.worker.quantize.pass_job import single_pass
for line in open(sys.argv[1], encoding="utf-8"):
    single_pass(decode_job(line), lambda answer: print(encode(answer).decode(), flush=True))
"""


def in_one_worker(toolchain: Toolchain, jobs: Iterable[PassJob], file: Path) -> list[Reply]:
    """All answers of a worker that makes several passes, which go through ``file``: llama.cpp computes its tables once."""
    file.write_bytes(b"".join(encode_job(job) + b"\n" for job in jobs))
    reading, writing = os.pipe()  # a worker stops when its stdin ends
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SEVERAL, file],
            stdin=reading,
            env=clean_environment({LIBRARY_VARIABLE: str(toolchain.directory)}),
            capture_output=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 0, done.stderr.decode()
    return list(map(decode_reply, done.stdout.decode().splitlines()))


def set_floats(path: Path, tensor: str, values: Iterable[float], first: int = 0) -> Path:
    """Overwrite elements of an F32, F16 or BF16 tensor in a GGUF file, from the one numbered ``first`` on."""
    header = read_header(path)
    (info,) = [info for info in header.tensors if info.name == tensor]
    data = np.array(list(values), "<f4")
    size = 4 if info.type_name == "F32" else 2
    if info.type_name == "F16":
        raw = data.astype("<f2").tobytes()
    else:
        assert info.type_name in ("F32", "BF16")
        raw = data.tobytes() if size == 4 else (data.view("<u4") >> 16).astype("<u2").tobytes()
    with path.open("r+b") as handle:
        handle.seek(header.data_offset + info.offset + first * size)
        handle.write(raw)
    return path


def engine_of(toolchain: Toolchain) -> EmbeddedEngine:
    """The embedded engine with the very libraries that these programs are linked to, and kernels of ours."""
    return EmbeddedEngine(find({LIBRARY_VARIABLE: str(toolchain.directory)}, cache_dir()), Runner(), cache_dir())


@dataclass(frozen=True)
class Made:
    """What one pass left, and how each of its levels ended."""

    job: PassJob
    levels: Mapping[str, PassedLevel]
    figures: PassFigures

    def files(self, name: str) -> list[Path]:
        (level,) = [level for level in self.job.levels if level.name == name]
        return sorted(level.job.out.parent.glob("*.gguf"))

    @property
    def digests(self) -> dict[str, list[str]]:
        """Of every file of every level, in order."""
        return {name: list(map(digest, self.files(name))) for name in self.levels}

    @property
    def spoiled(self) -> dict[str, tuple[str, str]]:
        return {name: (level.tensor, level.why) for name, level in self.levels.items() if level.why}


@dataclass(frozen=True)
class Passes:
    """Makes levels of one model both ways."""

    engine: EmbeddedEngine
    tools: BareTools

    def names(self, *without: str) -> list[str]:
        """Every type the library offers, but for aliases."""
        return [kind.name for kind in self.engine.types if not kind.alias_of and kind.name not in without]

    def plan(
        self,
        model: Path,
        names: Sequence[str],
        folder: Path,
        options: QuantizeOptions = NO_OPTIONS,
        imatrix: Path | None = None,
        *,
        threads: int | None = None,
        buffer_bytes: int = 1 << 30,
        donors: Sequence[Donor] = (),
        native_kernels: bool = True,
    ) -> PassJob:
        """The job of all levels of ``names``, from llama.cpp's dry runs; also of levels that a recipe says must fail."""
        source = open_gguf(model, allow_requantize=True)
        levels = resolve_levels(names, self.engine.types)
        jobs = [
            QuantizeJob("", source.path, folder / level.name / f"m-{level.name}.gguf", level.ftype, level.apply(options), *rest)
            for level in levels
            for rest in [(imatrix, threads, None)]
        ]
        weights = usable_weights(read(imatrix).matrix, imatrix, options) if imatrix is not None else None
        planned: list[PassLevel] = []
        for level, job, dry in zip(levels, jobs, self.engine.dry_runs(jobs, None), strict=True):
            assert isinstance(dry, DryRun), dry
            recipe = make_recipe(level, source.header, source.tensors, dry, weights, job.options)
            targets = tuple(TensorTarget(tensor.name, tensor.original, tensor.type) for tensor in recipe.tensors)
            job = replace(job, shards=recipe.shards)
            planned.append(PassLevel(level.name, job, targets, f"{level.name} of {model}"))
        return PassJob(
            step="pass",
            sources=source.files,
            levels=tuple(planned),
            donors=tuple(donors),
            lineage="lineage",
            imatrix=imatrix,
            threads=threads,
            buffer_bytes=buffer_bytes,
            log=folder / "log",
            native_kernels=native_kernels,
        )

    def given(self, job: PassJob, imatrix: Path) -> PassJob:
        """The same job with another imatrix; what each tensor becomes does not depend on the numbers in it."""
        levels = tuple(replace(level, job=replace(level.job, imatrix=imatrix)) for level in job.levels)
        return replace(job, imatrix=imatrix, levels=levels)

    def run(self, job: PassJob) -> Made:
        levels, figures = self.engine.one_pass(job, ignore)
        return Made(job, {level.name: level for level in levels}, figures)

    def make(
        self,
        model: Path,
        names: Sequence[str],
        folder: Path,
        options: QuantizeOptions = NO_OPTIONS,
        imatrix: Path | None = None,
        *,
        native_kernels: bool = True,
    ) -> Made:
        return self.run(self.plan(model, names, folder, options, imatrix, native_kernels=native_kernels))

    def for_worker(self, job: PassJob) -> PassJob:
        """The job as the engine sends it."""
        native = compile_kernels(cache_dir(), self.engine.bindings.digest) if job.native_kernels else None
        return replace(job, native=native if isinstance(native, Native) else None)

    def bare(self, planned: PassJob) -> dict[str, list[str]]:
        """Digests of the same levels' files by llama-quantize."""

        def one(level: PassLevel) -> list[str]:
            job, words = level.job, quantize_options(level.job.options)
            return quantized(self.tools, job.source, job.ftype, *words, imatrix=job.imatrix).digests

        with ThreadPoolExecutor(2) as pool:
            return dict(zip((level.name for level in planned.levels), pool.map(one, planned.levels), strict=True))

    def refused(self, made: Made) -> dict[str, str]:
        """What llama-quantize says of the levels that it will not make; the others' files are the same."""

        def one(level: PassLevel) -> Oracle:
            job, words = level.job, quantize_options(level.job.options)
            return quantized(self.tools, job.source, job.ftype, *words, imatrix=job.imatrix)

        with ThreadPoolExecutor(2) as pool:
            theirs = dict(zip(made.levels, pool.map(one, made.job.levels), strict=True))
        made_too = [name for name, oracle in theirs.items() if oracle.code == 0]
        assert {name: made.digests[name] for name in made_too} == {name: theirs[name].digests for name in made_too}
        return {name: oracle.err for name, oracle in theirs.items() if oracle.code != 0}

    def same(self, made: Made) -> None:
        """Every file of every level of a pass is llama-quantize's."""
        assert made.spoiled == {}
        found = made.digests
        assert all(found.values())
        assert found == self.bare(made.job)


def write_imatrix(path: Path, model: Path, *, seed: int = 5, without: Sequence[str] = ()) -> Path:
    """An imatrix of random weights for every matrix of a model, in the order of columns and experts; of mixtures one expert
    counted nothing. ``without``: parts of names that get no entry."""
    draw = np.random.default_rng(seed)
    entries: dict[str, MatrixEntry] = {}
    for tensor in open_gguf(model, allow_requantize=True).tensors:
        if len(tensor.shape) < 2 or any(part in tensor.name for part in without):
            continue
        experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
        counts = draw.integers(1, 1000, experts)
        counts[0] = 0 if experts > 1 else counts[0]
        entries[tensor.name] = MatrixEntry(draw.lognormal(0, 2, (experts, tensor.shape[0])) * counts[:, None], counts)
    write_gguf(Matrix(entries, 512, 7, ("random.txt",)), path)
    return path


def change_keys(path: Path, *, without: Sequence[str] = (), raw: Sequence[bytes] = ()) -> Path:
    """Rewrite a GGUF in place without some metadata keys and with ``raw`` entries (as they lie in a file) at the end."""
    header, data = read_header(path), path.read_bytes()
    start, entries = 24, []
    for key, size in header.kv_sizes.items():
        if key not in without:
            entries.append(data[start : start + size])
        start += size
    infos = data[start : start + sum(tensor.info_bytes for tensor in header.tensors)]
    head = data[:16] + struct.pack("<Q", len(entries) + len(raw)) + b"".join([*entries, *raw]) + infos
    path.write_bytes(head + bytes(-len(head) % header.alignment) + data[header.data_offset :])
    return path
