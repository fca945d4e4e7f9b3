"""Dry runs of the embedded engine's worker: the plans and the errors of llama-quantize, for every type and option."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.ftypes import quant_types
from imatrix_runner.engines.jobs import QuantizeJob, QuantizeOptions
from imatrix_runner.engines.llama_cpp.flags import quantize_command
from imatrix_runner.engines.llama_cpp.messages import explain
from imatrix_runner.engines.llama_cpp.output import QuantizeOutput
from imatrix_runner.engines.protocol import (
    DryRunsJob,
    Failed,
    Job,
    Planned,
    ProbeJob,
    Proven,
    Reply,
    decode_reply,
    encode_job,
)
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, ToolchainError, UsageError
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Command, Outcome, Runner
from imatrix_runner.toolchain.probe import Toolchain
from support.llama_tools import BareTools
from support.tiny_models import write_llama_gguf

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")

NO_OPTIONS = QuantizeOptions()


@dataclass(frozen=True)
class Ran:
    """How one child ended, what llama.cpp said about the tensors, and what the worker answered."""

    outcome: Outcome
    output: QuantizeOutput
    answers: tuple[Reply, ...] = ()

    @property
    def answer(self) -> Reply:
        return self.answers[-1]

    @property
    def plan(self) -> Planned:
        """What llama.cpp's words amount to."""
        dry = self.output.as_dry_run()
        return Planned(dict(dry.types), dry.fallbacks, dry.needs_imatrix)

    @property
    def failed(self) -> Failed:
        assert isinstance(self.answer, Failed), self.outcome.tail
        return self.answer


@dataclass(frozen=True)
class Both:
    """The worker and llama-quantize, asked for the same dry run."""

    ours: Ran
    theirs: Ran

    def same_plan(self) -> Planned:
        assert self.theirs.outcome.ok, self.theirs.outcome.tail
        assert isinstance(self.ours.answer, Planned), self.ours.outcome.tail
        assert self.ours.answer == self.theirs.plan
        return self.ours.answer

    def errors(self) -> tuple[RunnerError, RunnerError]:
        assert not self.theirs.outcome.ok
        return explain(self.ours.outcome, "it failed"), explain(self.theirs.outcome, "it failed")


@dataclass(frozen=True)
class Engines:
    """Both ways to plan. ``ours`` is given paths as the program gives them, absolute."""

    toolchain: Toolchain

    def ours(self, *jobs: QuantizeJob) -> Ran:
        return self.ask(DryRunsJob(jobs))

    def ask(self, job: Job) -> Ran:
        argv = (sys.executable, "-m", "imatrix_runner.engines.worker", encode_job(job).decode())
        said: list[str] = []
        output = QuantizeOutput()

        def hear(stream: str, text: str) -> None:
            output.feed(stream, text)
            if stream == "stdout":
                said.append(text)

        outcome = Runner().run(Command(argv, env=self._environment), on_text=hear)
        answers = "".join(said).splitlines()
        outcome = replace(outcome, tail=tuple(line for line in outcome.tail if line not in answers))
        return Ran(outcome, output, tuple(map(decode_reply, answers)))

    @property
    def _environment(self) -> dict[str, str]:
        return {"LLAMA_CPP_LIB_PATH": str(self.toolchain.directory)}

    def theirs(self, job: QuantizeJob) -> Ran:
        output = QuantizeOutput()
        outcome = Runner().run(quantize_command(job, self.toolchain, dry_run=True), on_text=output.feed)
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
    ) -> Both:
        """Neither writes a file."""
        job = QuantizeJob("level", source, folder / "out.gguf", ftype, options, imatrix, threads, None)
        with ThreadPoolExecutor() as pool:
            ours = pool.submit(self.ours, job)
            theirs = self.theirs(job)
        assert not job.out.exists()
        return Both(ours.result(), theirs)


@pytest.fixture(scope="module")
def engines(toolchain: Toolchain) -> Engines:
    return Engines(toolchain)


@pytest.fixture(scope="module")
def legacy_imatrix(tools: BareTools, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.merge([tiny_imatrix], tmp_path_factory.mktemp("legacy") / "imatrix.dat", "-c", "128", "--output-format", "dat")


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
    proven = engines.ask(ProbeJob(tmp_path)).answer
    assert isinstance(proven, Proven)
    assert {"GUESSED", "MOSTLY_NVFP4"} <= proven.ftypes.keys()
    assert quant_types(proven.ftypes) == engines.toolchain.types


def test_a_library_without_a_constant_does_not_offer_that_type() -> None:
    assert [kind.name for kind in quant_types({"MOSTLY_Q4_K_M": 15, "MOSTLY_Q9_X": 99})] == ["Q4_K", "Q4_K_M", "COPY"]


@pytest.mark.parametrize("with_imatrix", [True, False], ids=["with", "without"])
def test_every_type_in_one_worker(
    with_imatrix: bool, engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    """By name in any case, by alias and by number."""
    imatrix = tiny_imatrix if with_imatrix else None
    names = [*(kind.name for kind in engines.toolchain.types), "q4_k_m", "15"]
    jobs = [QuantizeJob(name, tiny_model, tmp_path / "out", name, NO_OPTIONS, imatrix, 1, None) for name in names]
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(engines.ours, *jobs)
        theirs = dict(zip(names, pool.map(engines.theirs, jobs), strict=True))
    assert dict(zip(names, ours.result().answers, strict=True)) == {name: ran.plan for name, ran in theirs.items()}
    assert all(ran.outcome.ok for ran in theirs.values())
    assert any(ran.plan.needs_imatrix for ran in theirs.values()) is not with_imatrix
    assert not list(tmp_path.iterdir())


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
    engines.both(tmp_path, tiny_model, "Q4_K_M", options, tiny_imatrix, threads=2).same_plan()


def test_options_change_the_plan(engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    """So that the test above means something: what concerns types is not lost on the way to both."""
    plain = engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=tiny_imatrix).same_plan()
    jobs = [QuantizeJob("", tiny_model, tmp_path / "o", "Q4_K_M", each, tiny_imatrix, 2, None) for each in OPTIONS.values()]
    plans = dict(zip(OPTIONS, engines.ours(*jobs).answers, strict=True))
    assert {name for name in OPTIONS if plans[name] == plain} == {"include", "exclude", "exclude all", "buffer", "overrides"}


def test_tensor_types_from_a_file_come_between_options_and_pins(
    engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    types = tmp_path / "types.txt"
    types.write_text("ffn_down=q8_0\tATTN_V=q6_k\r\n\n attn_k=f32 ", encoding="utf-8")
    options = QuantizeOptions(tensor_types=("ffn_down=q5_k",), tensor_type_file=types, pins=("attn_v=q2_k", "attn_q=q3_k"))
    kinds = engines.both(tmp_path, tiny_model, "Q4_K_M", options, tiny_imatrix).same_plan().types
    chosen = [kinds[f"blk.0.{name}.weight"] for name in ("ffn_down", "attn_v", "attn_k", "attn_q")]
    assert chosen == ["q5_K", "q6_K", "f32", "q3_K"]


def test_odd_shapes_fall_back_and_say_so(engines: Engines, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "odd.gguf", odd=True)
    plan = engines.both(tmp_path, model, "Q4_K_M").same_plan()
    assert [fallback.tensor for fallback in plan.fallbacks] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]


def test_with_options_fallbacks_and_pruned_layers(engines: Engines, tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "odd.gguf", odd=True, layers=3)
    options = QuantizeOptions(prune_layers="1", tensor_types=("attn_v=q8_0",), output_tensor_type="q5_k")
    plan = engines.both(tmp_path, model, "Q4_K_M", options).same_plan()
    assert plan.types["blk.1.attn_v.weight"] == "q8_0"
    assert plan.types["output.weight"] == "q5_K"
    assert len(plan.fallbacks) == 2


def test_a_quantised_source_with_permission(
    engines: Engines, tools: BareTools, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    source = tools.quantize(tiny_model, tmp_path / "small.gguf", "Q8_0")
    engines.both(tmp_path, source, "Q4_K_M", QuantizeOptions(allow_requantize=True), tiny_imatrix).same_plan()


@pytest.mark.parametrize("keep_split", [True, False], ids=["as shards", "as one file"])
def test_a_source_in_shards(
    keep_split: bool, engines: Engines, tools: BareTools, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    shards = tools.split(tiny_model, tmp_path / "shards" / "tiny-BF16", 8)
    assert len(shards) == 3
    options = QuantizeOptions(keep_split=keep_split)
    plan = engines.both(tmp_path, shards[0], "Q4_K_M", options, tiny_imatrix).same_plan()
    assert plan.types.keys() == {tensor.name for tensor in read_header(tiny_model).tensors}


def test_one_that_fails_does_not_stop_the_others(engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
    jobs = [QuantizeJob("", tiny_model, tmp_path / "o", name, NO_OPTIONS, None, 1, None) for name in ("Q4_0", "Q9_K", "Q8_0")]
    ran = engines.ours(*jobs)
    assert ran.outcome.ok
    assert [type(answer) for answer in ran.answers] == [Planned, Failed, Planned]


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
            ("Q4_K_M", {"prune_layers": "0,x"}, UsageError, "'x' is not a layer number"),
            ("Q4_K_M", {"prune_layers": "0,"}, UsageError, "'' is not a layer number"),
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

    @pytest.mark.parametrize("ftype", ["Q9_K", "NVFP4"])
    def test_a_type_that_is_not_offered(self, ftype: str, engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
        """llama-quantize takes it for the name of the output then, and misses a type."""
        made = engines.both(tmp_path, tiny_model, ftype)
        assert not made.theirs.outcome.ok
        assert made.ours.failed.exit_code == 5
        error = explain(made.ours.outcome, "it failed")
        assert type(error) is ToolchainError
        assert f"do not offer that type ({ftype})" in error.why

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

    def test_an_imatrix_that_is_not_finite(
        self, engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path
    ) -> None:
        imatrix = Path(shutil.copy(tiny_imatrix, tmp_path / "i.gguf"))
        set_floats(imatrix, "blk.0.attn_q.weight.in_sum2", [float("nan")])
        self._alike(engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=imatrix), InvalidDataError, "NaN or infinite")

    def test_a_source_that_is_no_model(self, engines: Engines, tmp_path: Path) -> None:
        model = tmp_path / "m.gguf"
        model.write_bytes(b"no model" * 100)
        self._alike(engines.both(tmp_path, model, "Q8_0"), InvalidDataError, "cannot load the model")

    def test_a_native_crash_is_the_worker_s_alone(
        self, engines: Engines, tools: BareTools, tiny_model: Path, tmp_path: Path
    ) -> None:
        """llama.cpp does not expect that a whole shard is pruned."""
        sources = tools.split(tiny_model, tmp_path / "shards" / "s", 1)
        options = QuantizeOptions(keep_split=True, prune_layers="0")
        made = engines.both(tmp_path, sources[0], "Q8_0", options)
        assert made.ours.outcome.returncode == made.theirs.outcome.returncode < 0
        assert made.ours.answers == ()
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
        assert made.ours.failed.exit_code == 5
        assert made.ours.failed.why


class TestDamagedImatrices:
    """The worker says itself what is wrong; llama-quantize refuses these too."""

    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda data: b"", "the file is empty or filled with zeros"),
            (lambda data: b"\0" * 400, "the file is empty or filled with zeros"),
            (lambda data: b"this is a text, not an imatrix" * 20, "neither a GGUF nor a legacy imatrix: it is text"),
            (lambda data: data[: len(data) // 2], "would end at byte"),
            (lambda data: data.replace(b"imatrix.chunk_count", b"imatrix.chunk_cownt"), "imatrix.chunk_count is missing"),
            (lambda data: data.replace(b"attn_q.weight.counts", b"attn_z.weight.counts"), "sums without counts"),
            (lambda data: data.replace(b".in_sum2", b".in_sum3").replace(b".counts", b".cownts"), "its metadata says imatrix"),
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
        self._refused(made.ours, why)
        assert why == "its metadata says imatrix" or not made.theirs.outcome.ok

    @pytest.mark.parametrize(
        ("keep", "insert", "why"),
        [
            (2, b"", "neither a GGUF nor a whole legacy imatrix"),
            (30, b"", "it was cut short"),
            (4000, b"", "it was cut short"),
            (4, b"\xff\xff\xff\x7f", "a name of 2147483647 bytes"),
            (4, b"\xff\xff\xff\xff", "a name of -1 bytes"),
        ],
        ids=["half a number", "half an entry", "some entries", "a huge name", "a negative name"],
    )
    def test_of_legacy(
        self, keep: int, insert: bytes, why: str, engines: Engines, tiny_model: Path, legacy_imatrix: Path, tmp_path: Path
    ) -> None:
        data = legacy_imatrix.read_bytes()
        imatrix = tmp_path / "i.dat"
        imatrix.write_bytes(data[:keep] + (insert + data[keep + 4 :] if insert else b""))
        made = engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=imatrix)
        self._refused(made.ours, why)
        assert not made.theirs.outcome.ok

    @pytest.mark.parametrize("count", [float("nan"), float("inf"), 1e30])
    def test_of_counts(self, count: float, engines: Engines, tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
        imatrix = Path(shutil.copy(tiny_imatrix, tmp_path / "i.gguf"))
        set_floats(imatrix, "blk.0.attn_q.weight.counts", [count])
        job = QuantizeJob("", tiny_model, tmp_path / "o.gguf", "Q4_K_M", NO_OPTIONS, imatrix, 1, None)
        self._refused(engines.ours(job), "NaN, infinite or absurd")

    def test_that_are_not_there(self, engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
        made = engines.both(tmp_path, tiny_model, "Q4_K_M", imatrix=tmp_path / "none.gguf")
        self._refused(made.ours, "No such file or directory")

    def _refused(self, ran: Ran, why: str) -> None:
        assert ran.failed.exit_code == 6
        assert why in ran.failed.why
        assert ran.failed.what
        assert ran.failed.todo


def test_nobody_listens_any_more(engines: Engines, tiny_model: Path, tmp_path: Path) -> None:
    """A worker whose parent died ends at its next word, as llama-quantize does."""
    job = DryRunsJob((QuantizeJob("", tiny_model, tmp_path / "o.gguf", "Q8_0", NO_OPTIONS, None, 1, None),))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "imatrix_runner.engines.worker", encode_job(job).decode()],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(engines.toolchain.directory)},
        stdout=writing,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    os.close(writing)
    assert done.returncode < 0
