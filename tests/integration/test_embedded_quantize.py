"""Levels from the embedded engine's worker: the bytes, the plans and the errors of llama-quantize."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from llama_tools import BareTools, digest
from tiny_models import write_llama_gguf

from imatrix_runner.engines.base import QuantizeJob, QuantizeOptions
from imatrix_runner.engines.binaries.argv import quantize_command
from imatrix_runner.engines.binaries.lines import QuantizeOutput
from imatrix_runner.engines.binaries.messages import explain
from imatrix_runner.engines.embedded.levels import quant_types
from imatrix_runner.engines.embedded.protocol import (
    Answer,
    Failed,
    Planned,
    Probe,
    Proven,
    Quantize,
    Request,
    Written,
    decode_answer,
    encode,
)
from imatrix_runner.errors import EngineError, InvalidDataError, NoSpaceError, RunnerError, ToolchainError, UsageError
from imatrix_runner.events import Progress
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Command, Outcome, Runner, capture
from imatrix_runner.toolchain.probe import Toolchain

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")

NO_OPTIONS = QuantizeOptions()
SLOW = ("IQ1_S", "IQ1_M", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS")  # their tables take seconds in every process
SEVERAL = """
import sys
from imatrix_runner.engines.embedded.protocol import decode_request, encode
from imatrix_runner.engines.embedded.quantizing import quantize
for request in sys.argv[1:]:
    quantize(decode_request(request), lambda answer: print(encode(answer).decode(), flush=True))
"""


@dataclass(frozen=True)
class Ran:
    """How one child ended, what llama.cpp said about the tensors, and what the worker answered."""

    outcome: Outcome
    output: QuantizeOutput
    answers: tuple[Answer, ...] = ()

    @property
    def answer(self) -> Answer:
        return self.answers[-1]

    @property
    def written(self) -> Written:
        """What llama.cpp's words amount to."""
        return Written(tuple(self.output.fallbacks), tuple(self.output.without_weights))

    @property
    def failed(self) -> Failed:
        assert isinstance(self.answer, Failed), self.outcome.tail
        return self.answer


@dataclass(frozen=True)
class Both:
    """The worker and llama-quantize, asked for the same."""

    ours: Ran
    theirs: Ran
    files: tuple[Path, Path]

    def same_file(self) -> None:
        assert self.theirs.outcome.ok, self.theirs.outcome.tail
        assert self.ours.outcome.ok, self.ours.outcome.tail
        assert digest(self.files[0]) == digest(self.files[1])

    def errors(self) -> tuple[RunnerError, RunnerError]:
        assert not self.ours.outcome.ok
        assert not self.theirs.outcome.ok
        writes = self.files[0].parent
        return tuple(explain(ran.outcome, "it failed", writes=writes) for ran in (self.ours, self.theirs))


def _request(job: QuantizeJob, *, dry_run: bool = False) -> Quantize:
    return Quantize(job.step, job.source, job.out, job.ftype, job.options, job.imatrix, job.threads, dry_run)


@dataclass(frozen=True)
class Engines:
    """Both ways to quantise. ``ours`` is given paths as the program gives them, absolute."""

    toolchain: Toolchain

    def ours(self, job: QuantizeJob, *, dry_run: bool = False) -> Ran:
        return self.ask(_request(job, dry_run=dry_run))

    def in_one(self, jobs: Iterable[QuantizeJob]) -> list[Answer]:
        """The last answers of a worker that does several jobs, so that llama.cpp computes its tables once."""
        argv = (sys.executable, "-c", SEVERAL, *(encode(_request(job)).decode() for job in jobs))
        done = capture(Command(argv, env=self._environment), seconds=300)
        assert done.returncode == 0, done.stderr
        answers = map(decode_answer, done.stdout.splitlines())
        return [answer for answer in answers if not isinstance(answer, Progress)]

    def ask(self, request: Request) -> Ran:
        argv = (sys.executable, "-m", "imatrix_runner.engines.embedded", encode(request).decode())
        said: list[str] = []
        output = QuantizeOutput()

        def hear(stream: str, text: str) -> None:
            output.feed(stream, text)
            if stream == "stdout":
                said.append(text)

        outcome = Runner().run(Command(argv, env=self._environment), on_text=hear)
        answers = "".join(said).splitlines()
        outcome = replace(outcome, tail=tuple(line for line in outcome.tail if line not in answers))
        return Ran(outcome, output, tuple(map(decode_answer, answers)))

    @property
    def _environment(self) -> dict[str, str]:
        return {"LLAMA_CPP_LIB_PATH": str(self.toolchain.directory)}

    def theirs(self, job: QuantizeJob, *, dry_run: bool = False) -> Ran:
        output = QuantizeOutput()
        outcome = Runner().run(quantize_command(job, self.toolchain, dry_run=dry_run), on_text=output.feed)
        return Ran(outcome, output)

    def both(
        self,
        folder: Path,
        source: Path,
        ftype: str,
        options: QuantizeOptions = NO_OPTIONS,
        imatrix: Path | None = None,
        *,
        threads: int | None = None,
        dry_run: bool = False,
    ) -> Both:
        files = (folder / "ours.gguf", folder / "theirs.gguf")
        jobs = [QuantizeJob("level", source, file, ftype, options, imatrix, threads, None) for file in files]
        with ThreadPoolExecutor() as pool:
            ours = pool.submit(self.ours, jobs[0], dry_run=dry_run)
            theirs = self.theirs(jobs[1], dry_run=dry_run)
        return Both(ours.result(), theirs, files)


@pytest.fixture(scope="module")
def engines(toolchain: Toolchain) -> Engines:
    return Engines(toolchain)


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("moe") / "moe-BF16.gguf", experts=4, tied=True, ff=256)


@pytest.fixture(scope="module")
def moe_imatrix(tools: BareTools, moe_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert that saw nothing, one that counts as 0, and one whose count is rounded up."""
    path = tmp_path_factory.mktemp("moe-imatrix") / "imatrix.gguf"
    tools.imatrix(moe_model, tiny_text, path, "-c", "128", "--chunks", "4")
    set_floats(path, "blk.0.ffn_down_exps.weight.counts", [0.0, 0.49, 2.5, 7.0])
    return path


@pytest.fixture(scope="module")
def legacy_imatrix(tools: BareTools, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.merge([tiny_imatrix], tmp_path_factory.mktemp("legacy") / "imatrix.dat", "-c", "128", "--output-format", "dat")


@pytest.fixture(scope="module")
def shards(tools: BareTools, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tools.split(tiny_model, tmp_path_factory.mktemp("shards") / "tiny-BF16", 8)


def set_floats(path: Path, tensor: str, values: Iterable[float]) -> None:
    """Overwrite the beginning of an F32 tensor in a GGUF file."""
    header = read_header(path)
    (info,) = [info for info in header.tensors if info.name == tensor]
    assert info.type_name == "F32"
    with path.open("r+b") as handle:
        handle.seek(header.data_offset + info.offset)
        handle.write(np.array(list(values), "<f4").tobytes())


def test_the_bindings_constants_give_exactly_the_types_of_the_program(engines: Engines, tmp_path: Path) -> None:
    """Names, numbers, order, aliases and help, though the constants know more and have another order."""
    proven = engines.ask(Probe(tmp_path)).answer
    assert isinstance(proven, Proven)
    assert {"GUESSED", "MOSTLY_NVFP4"} <= proven.ftypes.keys()
    assert quant_types(proven.ftypes) == engines.toolchain.types


def test_a_library_without_a_constant_does_not_offer_that_type() -> None:
    assert [kind.name for kind in quant_types({"MOSTLY_Q4_K_M": 15, "MOSTLY_Q9_X": 99})] == ["Q4_K", "Q4_K_M", "COPY"]


def test_every_type_gives_the_bytes_of_the_program(
    engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    """All of them with an imatrix. The slow ones share one worker; llama-quantize computes their tables for each anew."""
    names = [kind.name for kind in engines.toolchain.types]
    assert set(SLOW) <= set(names)
    jobs = {
        (name, who): QuantizeJob(name, tiny_model, tmp_path / f"{name}-{who}", name, NO_OPTIONS, tiny_imatrix, 1, None)
        for name in (*SLOW, *(name for name in names if name not in SLOW))
        for who in ("ours", "theirs")
    }
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(engines.in_one, [jobs[name, "ours"] for name in SLOW])
        theirs = {name: pool.submit(engines.theirs, jobs[name, "theirs"]) for name, who in jobs if who == "theirs"}
        ours = {name: pool.submit(engines.ours, jobs[name, "ours"]) for name in names if name not in SLOW}
    made = {name: ran.result().answer for name, ran in ours.items()} | dict(zip(SLOW, slow.result(), strict=True))
    assert made == {name: theirs[name].result().written for name in names}
    digests = {name: digest(jobs[name, "ours"].out) for name in names}
    assert digests == {name: digest(jobs[name, "theirs"].out) for name in names}
    assert len(set(digests.values())) == len(names) - 4  # three aliases; a copy of a BF16 model is its BF16
    assert made["IQ2_XXS"] == Written((), ("output.weight", "token_embd.weight"))


@pytest.mark.parametrize("ftype", ["q4_k_m", "15", "Q2_K", "IQ4_XS", "MXFP4_MOE", "TQ2_0", "F16", "F32", "BF16", "COPY"])
def test_without_an_imatrix(ftype: str, engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
    engines.both(tmp_path, tiny_model, ftype).same_file()


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_sources_of_other_precision(dtype: str, engines: Engines, tiny_imatrix: Path, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "model.gguf", dtype=dtype)
    engines.both(tmp_path, model, "Q4_K_M", imatrix=tiny_imatrix).same_file()


def test_a_legacy_imatrix(engines: Engines, tiny_model: Path, legacy_imatrix: Path, tmp_path: Path) -> None:
    engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=legacy_imatrix).same_file()
    assert read_header(tmp_path / "ours.gguf").metadata["quantize.imatrix.chunks_count"] == 20


@pytest.mark.parametrize("cut", [1, 8, 30], ids="without the last {} bytes".format)
def test_a_legacy_imatrix_whose_trailer_is_cut(
    cut: int, engines: Engines, tiny_model: Path, legacy_imatrix: Path, tmp_path: Path
) -> None:
    """Chunks and dataset may be missing; what is there of them counts."""
    data = legacy_imatrix.read_bytes()
    trailer = len(data) - data.rindex(b"/tmp") + 8
    short = tmp_path / "short.dat"
    short.write_bytes(data[: len(data) - trailer + {1: 2, 8: 6, 30: trailer - 1}[cut]])
    engines.both(tmp_path, tiny_model, "Q4_0", imatrix=short).same_file()


def test_a_legacy_imatrix_with_odd_names(engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
    """They end at a NUL, and of two entries with one name the later counts; 0 calls divide nothing."""
    imatrix = tmp_path / "odd.dat"
    name, random = b"blk.0.attn_q.weight", np.random.default_rng(1)
    entries = [(name, 3), (name + b"\0tail", 7), (b"", 1), (b"blk.0.attn_k.weight", 0), (b"blk.0.attn_v.weight", 16777217)]
    values = [(key, calls, random.random(256, np.float32).tobytes()) for key, calls in entries]
    parts = [struct.pack("<i", len(key)) + key + struct.pack("<ii", calls, 256) + data for key, calls, data in values]
    imatrix.write_bytes(struct.pack("<i", len(parts)) + b"".join(parts) + struct.pack("<ii", 5, 4) + b"a\0bc")
    engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=imatrix).same_file()
    assert read_header(tmp_path / "ours.gguf").metadata["quantize.imatrix.entries_count"] == 4


@pytest.mark.parametrize("ftype", ["Q4_K_M", "IQ3_S"])
def test_a_mixture_of_experts(ftype: str, engines: Engines, moe_model: Path, moe_imatrix: Path, tmp_path: Path) -> None:
    engines.both(tmp_path, moe_model, ftype, imatrix=moe_imatrix).same_file()


def test_the_imatrix_s_names_are_cut_and_kept_as_bytes(
    engines: Engines, tools: BareTools, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """A long dataset that is no UTF-8, and a file name whose 127th byte is half a letter."""
    text = tmp_path / ("d" * 90) / ("t" * 90) / "words.txt"
    text.parent.mkdir(parents=True)
    shutil.copy(tiny_text, text)
    imatrix = tmp_path / f"x{'ä' * 80}.gguf"
    tools.imatrix(tiny_model, text, imatrix, "-c", "128", "--chunks", "1")
    data = imatrix.read_bytes()
    start = data.index(str(text).encode())
    imatrix.write_bytes(data[:start] + b"/t\xff\xfe" + data[start + 4 :])
    engines.both(tmp_path, tiny_model, "Q4_0", imatrix=imatrix).same_file()
    assert b"/t\xff\xfe" in (tmp_path / "ours.gguf").read_bytes()


OPTIONS = {
    "pure": QuantizeOptions(pure=True),
    "leave the output": QuantizeOptions(leave_output_tensor=True),
    "output type": QuantizeOptions(output_tensor_type="Q8_0"),
    "embedding type": QuantizeOptions(token_embedding_type="q5_k"),
    "tensor types": QuantizeOptions(tensor_types=("FFN_Down=Q8_0", "n_(q|k)=q5_k", "ffn_down=q2_k", r"blk\.\d\.ffn_up=bf16")),
    "pins last": QuantizeOptions(tensor_types=("ffn_down=q8_0",), pins=("ffn_down=q2_k", "attn_q=q6_k")),
    "include": QuantizeOptions(include_weights=("ffn_", "attn_q")),
    "exclude": QuantizeOptions(exclude_weights=("attn_v", "blk.1.")),
    "exclude all": QuantizeOptions(exclude_weights=("blk", "output")),
    "prune": QuantizeOptions(prune_layers="0"),
    "buffer": QuantizeOptions(max_buffer_size=1),
    "overrides": QuantizeOptions(
        override_kv=(
            "general.name=str:änother=name",
            f"my.text=str:{'x' * 127}",
            "my.empty=str:",
            "llama.context_length=int:512",
            "my.negative=int:-7 and more",
            "my.nothing=int:x",
            "my.large=int:99999999999999999999",
            "my.float=float: 1.5e-3x",
            "my.hex=float:-0x1.8p3",
            "my.infinite=float:inf",
            "my.true=bool:true",
            "my.false=bool:false",
            "my.true=bool:false",
            "quantize.imatrix.file=str:mine",
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: QuantizeOptions, engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    made = engines.both(tmp_path, tiny_model, "Q4_K_M", options, tiny_imatrix, threads=2)
    made.same_file()
    assert made.ours.answer == made.theirs.written


def test_options_change_the_file(engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    """So that the test above means something: none of them was lost on the way to both."""
    digests = set()
    for number, options in enumerate(OPTIONS.values()):
        out = tmp_path / f"{number}.gguf"
        assert engines.theirs(QuantizeJob("", tiny_model, out, "Q4_K_M", options, tiny_imatrix, 2, None)).outcome.ok
        digests.add(digest(out))
    assert len(digests) == len(OPTIONS)


def test_tensor_types_from_a_file_come_between_options_and_pins(
    engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    types = tmp_path / "types.txt"
    types.write_text("ffn_down=q8_0\tATTN_V=q6_k\r\n\n attn_k=f32 ", encoding="utf-8")
    options = QuantizeOptions(tensor_types=("ffn_down=q5_k",), tensor_type_file=types, pins=("attn_v=q2_k", "attn_q=q3_k"))
    made = engines.both(tmp_path, tiny_model, "Q4_K_M", options, tiny_imatrix)
    made.same_file()
    kinds = {tensor.name: tensor.type_name for tensor in read_header(tmp_path / "ours.gguf").tensors}
    chosen = [kinds[f"blk.0.{name}.weight"] for name in ("ffn_down", "attn_v", "attn_k", "attn_q")]
    assert chosen == ["Q5_K", "Q6_K", "F32", "Q3_K"]


def test_odd_shapes_fall_back_and_say_so(engines: Engines, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "odd.gguf", odd=True)
    made = engines.both(tmp_path, model, "Q4_K_M")
    made.same_file()
    assert isinstance(made.ours.answer, Written)
    assert made.ours.answer.fallbacks == tuple(made.theirs.output.fallbacks)
    assert [fallback.tensor for fallback in made.ours.answer.fallbacks] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]


def test_a_quantised_source_with_permission(
    engines: Engines, tools: BareTools, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    source = tools.quantize(tiny_model, tmp_path / "small.gguf", "Q8_0")
    engines.both(tmp_path, source, "Q4_K_M", QuantizeOptions(allow_requantize=True), tiny_imatrix).same_file()


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_shards_stay_shards(suffix: str, engines: Engines, shards: list[Path], tiny_imatrix: Path, tmp_path: Path) -> None:
    assert len(shards) == 3
    found = []
    for run, name in ((engines.ours, "ours"), (engines.theirs, "theirs")):
        folder = tmp_path / name
        folder.mkdir()
        job = QuantizeJob(
            "", shards[0], folder / f"s{suffix}", "Q4_K_M", QuantizeOptions(keep_split=True), tiny_imatrix, 1, None
        )
        assert run(job).outcome.ok
        found.append({path.name: digest(path) for path in folder.iterdir()})
    assert found[0] == found[1]
    assert sorted(found[0]) == [f"s-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def test_shards_become_one_file(engines: Engines, shards: list[Path], tiny_imatrix: Path, tmp_path: Path) -> None:
    engines.both(tmp_path, shards[0], "Q4_K_M", imatrix=tiny_imatrix).same_file()


def test_progress_counts_the_weights_of_finished_tensors(engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
    ran = engines.ours(QuantizeJob("level-Q4_0", tiny_model, tmp_path / "o.gguf", "Q4_0", NO_OPTIONS, None, 1, None))
    told = [answer for answer in ran.answers if isinstance(answer, Progress)]
    tensors = read_header(tiny_model).tensors
    assert {answer.step for answer in told} == {"level-Q4_0"}
    assert [answer.done for answer in told] == sorted(answer.done for answer in told)
    assert told[-1].done == sum(tensor.n_elements for tensor in tensors)
    names = {f" {tensor.name}" for tensor in tensors}
    assert {re.sub(rf"^\d+/{len(tensors)}", "", answer.note) for answer in told} == names


class TestDryRuns:
    @pytest.mark.parametrize("ftype", ["Q4_K_M", "IQ2_M", "IQ1_S", "F16", "COPY"])
    @pytest.mark.parametrize("with_imatrix", [True, False], ids=["with", "without"])
    def test_the_plan_is_the_program_s(
        self, ftype: str, with_imatrix: bool, engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
    ) -> None:
        imatrix = tiny_imatrix if with_imatrix else None
        self._same(engines.both(tmp_path, tiny_model, ftype, imatrix=imatrix, dry_run=True), tmp_path)

    def test_with_options_fallbacks_and_pruned_layers(self, engines: Engines, tmp_path: Path) -> None:
        model = write_llama_gguf(tmp_path / "odd.gguf", odd=True, layers=3)
        options = QuantizeOptions(prune_layers="1", tensor_types=("attn_v=q8_0",), output_tensor_type="q5_k")
        plan = self._same(engines.both(tmp_path, model, "Q4_K_M", options, dry_run=True), tmp_path)
        assert plan.types["blk.1.attn_v.weight"] == "q8_0"
        assert plan.types["output.weight"] == "q5_K"
        assert len(plan.fallbacks) == 2

    def _same(self, made: Both, folder: Path) -> Planned:
        dry = made.theirs.output.as_dry_run()
        assert made.ours.answer == Planned(dict(dry.types), dry.fallbacks, dry.needs_imatrix)
        assert not list(folder.glob("*ours*"))
        assert isinstance(made.ours.answer, Planned)
        return made.ours.answer


class TestErrors:
    """Both engines fail alike: the parent's table explains the worker's words as it explains llama-quantize's."""

    @pytest.mark.parametrize(
        ("ftype", "options", "kind", "why"),
        [
            ("Q4_K_M", {"tensor_types": ("attn_(q=q8_0",)}, UsageError, "Mismatched '(' and ')'"),
            ("Q4_K_M", {"pins": ("[z-a]=q8_0",)}, UsageError, "Invalid range in bracket expression"),
            ("Q4_K_M", {"tensor_types": ("attn_q=q9_0",)}, UsageError, "no tensor type q9_0"),
            ("Q4_K_M", {"tensor_types": ("attn_q",)}, UsageError, "malformed tensor type 'attn_q'"),
            ("Q4_K_M", {"tensor_types": ("=q8_0",)}, UsageError, "missing tensor name"),
            ("Q4_K_M", {"tensor_types": ("attn_q=",)}, UsageError, "missing quantization type"),
            ("Q4_K_M", {"tensor_type_file": Path("/no/such/file")}, UsageError, "/no/such/file cannot be read: No such"),
            ("Q4_K_M", {"output_tensor_type": "best"}, UsageError, "no tensor type best"),
            ("Q4_K_M", {"token_embedding_type": "q4"}, UsageError, "no tensor type q4"),
            ("Q4_K_M", {"prune_layers": "0,x"}, UsageError, "'x' is no layer's number"),
            ("Q4_K_M", {"prune_layers": "0,"}, UsageError, "'' is no layer's number"),
            ("Q9_K", {}, ToolchainError, "do not offer that type (Q9_K)"),
            ("NVFP4", {}, ToolchainError, "do not offer that type (NVFP4)"),
            (
                "IQ2_XXS",
                {"exclude_weights": ("blk.1.attn_q",)},
                InvalidDataError,
                "no imatrix data for tensor blk.1.attn_q.weight",
            ),
            ("IQ2_XXS", {"exclude_weights": ("",)}, InvalidDataError, "cannot do without an importance matrix"),
        ],
        ids=str,
    )
    def test_options(
        self,
        ftype: str,
        options: dict[str, object],
        kind: type[RunnerError],
        why: str,
        engines: Engines,
        tiny_model: Path,
        tiny_imatrix: Path,
        tmp_path: Path,
    ) -> None:
        made = engines.both(tmp_path, tiny_model, ftype, QuantizeOptions(**options), tiny_imatrix)
        self._alike(made, kind, why)

    @pytest.mark.parametrize(
        "override",
        ["novalue", "=int:1", "a=u8:1", "a=int", "a=bool:yes", f"a=str:{'x' * 128}", f"{'a' * 128}=int:1"],
        ids=lambda text: text[:12],
    )
    def test_overrides(self, override: str, engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
        """llama-quantize says what is wrong through a log of its own thread, and often ends before that was written."""
        made = engines.both(tmp_path, tiny_model, "Q4_K_M", QuantizeOptions(override_kv=(override,)))
        assert override.startswith("=") or not made.theirs.outcome.ok  # with an empty key it would drop all overrides
        assert made.ours.failed.exit_code == 5
        error = explain(made.ours.outcome, "it failed")
        assert type(error) is UsageError
        assert f"'{override}' is not KEY=TYPE:VALUE" in error.why

    def test_low_bit_types_without_an_imatrix(self, engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
        made = engines.both(tmp_path, tiny_model, "IQ2_XXS")
        self._alike(made, InvalidDataError, "cannot do without an importance matrix")
        assert not made.files[0].exists()

    def test_an_imatrix_of_another_model(self, engines: Engines, tiny_imatrix: Path, tmp_path: Path) -> None:
        model = write_llama_gguf(tmp_path / "wide.gguf", hidden=512)
        self._alike(engines.both(tmp_path, model, "Q4_K_M", imatrix=tiny_imatrix), InvalidDataError, "from another model")

    def test_an_imatrix_that_is_not_finite(
        self, engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
    ) -> None:
        imatrix = Path(shutil.copy(tiny_imatrix, tmp_path / "i.gguf"))
        set_floats(imatrix, "blk.0.attn_q.weight.in_sum2", [float("nan")])
        self._alike(engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=imatrix), InvalidDataError, "NaN or infinite")

    def test_a_quantised_source(self, engines: Engines, tools: BareTools, tiny_model: Path, tmp_path: Path) -> None:
        source = tools.quantize(tiny_model, tmp_path / "small.gguf", "Q8_0")
        self._alike(engines.both(tmp_path, source, "Q4_K_M"), InvalidDataError, "already quantised (q8_0)")

    @pytest.mark.parametrize(
        ("weight", "why"), [(1e38, "what a tensor became holds NaN"), (float("nan"), "the weights of output.weight hold NaN")]
    )
    def test_weights_that_are_not_finite(self, weight: float, why: str, engines: Engines, tmp_path: Path) -> None:
        """From the beginning, or because they are too large for the type."""
        model = write_llama_gguf(tmp_path / "m.gguf", dtype="f32")
        set_floats(model, "output.weight", [weight])
        self._alike(engines.both(tmp_path, model, "F16"), InvalidDataError, why)

    def test_a_source_that_is_no_model(self, engines: Engines, tmp_path: Path) -> None:
        model = tmp_path / "m.gguf"
        model.write_bytes(b"no model" * 100)
        self._alike(engines.both(tmp_path, model, "Q8_0"), InvalidDataError, "cannot load the model")

    def test_a_source_that_is_the_output(self, engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
        source = Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))
        job = QuantizeJob("", source, source, "Q8_0", NO_OPTIONS, None, 1, None)
        self._alike(
            Both(engines.ours(job), engines.theirs(job), (source, source)), EngineError, "input and output files are the same"
        )
        assert digest(source) == digest(tiny_model)

    def test_a_disk_that_is_full(
        self, engines: Engines, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = QuantizeJob("", tiny_model, Path("/dev/full"), "Q8_0", NO_OPTIONS, None, 1, None)
        made = Both(engines.ours(job), engines.theirs(job), (tmp_path / "o", tmp_path / "o"))
        self._alike(made, EngineError, "iostream error")
        monkeypatch.setattr("imatrix_runner.engines.binaries.messages.free_bytes", lambda _path: 4096)
        self._alike(made, NoSpaceError, "the disk became full")

    @pytest.mark.parametrize("threads", [1, 4])
    def test_a_low_bit_type_where_llama_cpp_expects_none(
        self, threads: int, engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
    ) -> None:
        """The embeddings have no weights, llama.cpp does not look, and llama-quantize is killed by an assertion."""
        options = QuantizeOptions(token_embedding_type="iq2_xxs")
        made = engines.both(tmp_path, tiny_model, "Q4_0", options, tiny_imatrix, threads=threads)
        assert made.theirs.outcome.returncode == -signal.SIGABRT
        assert made.ours.failed.exit_code == made.ours.outcome.returncode == 5
        error = made.errors()[0]
        assert type(error) is InvalidDataError
        assert error.why == "there is no imatrix data for tensor token_embd.weight, and its type cannot do without"

    def test_a_native_crash_is_the_worker_s_alone(
        self, engines: Engines, tools: BareTools, tiny_model: Path, tmp_path: Path
    ) -> None:
        """llama.cpp does not expect that a whole shard is pruned."""
        sources = tools.split(tiny_model, tmp_path / "shards" / "s", 1)
        options = QuantizeOptions(keep_split=True, prune_layers="0")
        made = engines.both(tmp_path, sources[0], "Q8_0", options)
        assert made.ours.outcome.returncode == made.theirs.outcome.returncode < 0
        assert not any(isinstance(answer, Failed | Written) for answer in made.ours.answers)
        ours, theirs = made.errors()
        assert type(ours) is type(theirs) is EngineError
        assert "killed by SIG" in ours.why

    def _alike(self, made: Both, kind: type[RunnerError], why: str) -> None:
        ours, theirs = made.errors()
        assert type(ours) is type(theirs) is kind, (made.ours.outcome.tail, made.theirs.outcome.tail)
        # The number in "exit code 1; …" is each program's own.
        lines = [(error.what, re.sub(r"exit code \d", "", error.why), error.todo) for error in (ours, theirs)]
        assert lines[0] == lines[1]
        assert why in ours.why
        assert made.ours.failed.exit_code == made.ours.outcome.returncode == 5
        assert made.ours.failed.why


class TestDamagedImatrices:
    """The worker says itself what is wrong; llama-quantize refuses these too."""

    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda data: b"", "neither a GGUF nor a whole legacy imatrix"),
            (lambda data: b"\0" * 400, "it would have 0 entries"),
            (lambda data: b"this is a text, not an imatrix" * 20, "neither a GGUF nor a whole legacy imatrix"),
            (lambda data: data[: len(data) // 2], "would end at byte"),
            (lambda data: data.replace(b"imatrix.chunk_count", b"imatrix.chunk_cownt"), "imatrix.chunk_count is missing"),
            (lambda data: data.replace(b"attn_q.weight.counts", b"attn_z.weight.counts"), "sums without counts"),
            (lambda data: data.replace(b".in_sum2", b".in_sum3").replace(b".counts", b".cownts"), "without imatrix data"),
        ],
        ids=["empty", "zeros", "text", "half", "no chunk count", "other names", "no sums"],
    )
    def test_of_gguf(
        self,
        damage: Callable[[bytes], bytes],
        why: str,
        engines: Engines,
        tiny_model: Path,
        tiny_imatrix: Path,
        tmp_path: Path,
    ) -> None:
        imatrix = tmp_path / "i.gguf"
        imatrix.write_bytes(damage(tiny_imatrix.read_bytes()))
        made = engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=imatrix)
        self._refused(made, why)
        assert why == "without imatrix data" or not made.theirs.outcome.ok

    @pytest.mark.parametrize(
        ("keep", "insert"),
        [(2, b""), (30, b""), (4000, b""), (4, b"\xff\xff\xff\x7f"), (4, b"\xff\xff\xff\xff")],
        ids=["half a number", "half an entry", "some entries", "a huge name", "a negative name"],
    )
    def test_of_legacy(
        self, keep: int, insert: bytes, engines: Engines, tiny_model: Path, legacy_imatrix: Path, tmp_path: Path
    ) -> None:
        data = legacy_imatrix.read_bytes()
        imatrix = tmp_path / "i.dat"
        imatrix.write_bytes(data[:keep] + (insert + data[keep + 4 :] if insert else b""))
        made = engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=imatrix)
        self._refused(made, "neither a GGUF nor a whole legacy imatrix")
        assert not made.theirs.outcome.ok

    @pytest.mark.parametrize("count", [float("nan"), float("inf"), 1e30])
    def test_of_counts(self, count: float, engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
        imatrix = Path(shutil.copy(tiny_imatrix, tmp_path / "i.gguf"))
        set_floats(imatrix, "blk.0.attn_q.weight.counts", [count])
        job = QuantizeJob("", tiny_model, tmp_path / "o.gguf", "Q4_K_M", NO_OPTIONS, imatrix, 1, None)
        self._refused(Both(engines.ours(job), engines.ours(job), (job.out, job.out)), "NaN, infinite or absurd")

    def test_that_are_not_there(self, engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
        made = engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=tmp_path / "none.gguf")
        self._refused(made, "No such file or directory")

    def _refused(self, made: Both, why: str) -> None:
        failed = made.ours.failed
        assert failed.exit_code == made.ours.outcome.returncode == 6
        assert why in failed.why
        assert failed.what
        assert failed.todo
        assert not made.files[0].exists()


def test_nobody_listens_any_more(engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
    """A worker whose parent died ends at its next word, as llama-quantize does."""
    request = Quantize("", tiny_model, tmp_path / "o.gguf", "Q8_0", NO_OPTIONS, None, 1, False)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "imatrix_runner.engines.embedded", encode(request).decode()],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(engines.toolchain.directory)},
        stdout=writing,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    os.close(writing)
    assert done.returncode < 0
