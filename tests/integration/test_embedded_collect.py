"""The embedded engine's sums against llama-imatrix's, over architectures and options; stopping, continuing, refusing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.embedded.bindings import Bindings, find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine, worker_command
from imatrix_runner.engines.jobs import (
    ChunkRange,
    CollectedRange,
    CollectJob,
    CollectOptions,
    DryRun,
    QuantizeJob,
    QuantizeOptions,
)
from imatrix_runner.engines.protocol import ProbeJob
from imatrix_runner.errors import EngineError, InterruptedRunError, InvalidDataError
from imatrix_runner.events import Event, Progress, ignore
from imatrix_runner.imatrix.formats import read
from imatrix_runner.imatrix.matrix import Matrix
from imatrix_runner.process import Runner, child_environment
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.store import cache_dir
from support.llama_tools import BareTools
from support.tiny_architectures import ARCHITECTURES, write_architecture
from support.tiny_models import write_llama_gguf

TOLERANCE = 5e-5
"""llama-imatrix sums in float32, one by one; ours is the more exact."""

FEW = CollectOptions(n_ctx=128, threads=2, ppl=False)


@pytest.fixture(scope="module")
def bindings() -> Bindings:
    return find(os.environ, cache_dir())


@pytest.fixture(scope="module")
def engine(bindings: Bindings) -> EmbeddedEngine:
    return EmbeddedEngine(bindings, Runner())


@dataclass
class Heard:
    """What an engine told: its pieces and its events."""

    pieces: list[CollectedRange] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def take(self, piece: CollectedRange) -> bool:
        self.pieces.append(piece)
        return True


def job(model: Path, text: Path, folder: Path, options: CollectOptions, *ranges: tuple[int, int]) -> CollectJob:
    folder.mkdir(exist_ok=True)
    pieces = tuple(ChunkRange(first, count) for first, count in ranges)
    return CollectJob("imatrix", model, text, pieces, folder, options, "the same", folder / "log")


def collected(engine: EmbeddedEngine, wanted: CollectJob) -> Heard:
    heard = Heard()
    engine.collect(wanted, heard.events.append, heard.take)
    assert [piece.chunks for piece in heard.pieces] == list(wanted.ranges)
    return heard


def difference(ours: Matrix, theirs: Matrix) -> float:
    """The largest relative difference of a mean; entries, shapes and counts must be the same."""
    assert set(ours.entries) == set(theirs.entries)
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    worst = 0.0
    for name in theirs.entries:
        one, other = ours.entries[name], theirs.entries[name]
        assert one.sums.shape == other.sums.shape, name
        assert np.array_equal(one.counts, other.counts), name
        scale = np.maximum(other.sums, 1e-30)
        worst = max(worst, float((np.abs(one.sums - other.sums) / scale).max()))
    return worst


def same_as_theirs(
    engine: EmbeddedEngine,
    tools: BareTools,
    model: Path,
    text: Path,
    folder: Path,
    options: CollectOptions,
    count: int,
    *flags: str,
) -> tuple[float, dict[int, str], CollectedRange]:
    """Chunks 0 .. count-1 by both; the difference, what llama-imatrix printed, and our piece."""
    heard = collected(engine, job(model, text, folder / "ours", options, (0, count)))
    ppl = () if options.ppl else ("--no-ppl",)
    printed = tools.imatrix(
        model,
        text,
        folder / "theirs.gguf",
        "-c",
        str(options.n_ctx),
        "--chunks",
        str(count),
        "-fit",
        "off",
        "-t",
        "2",
        *ppl,
        *flags,
    )
    worst = difference(read(heard.pieces[0].path, exact=True).matrix, read(folder / "theirs.gguf").matrix)
    return worst, printed, heard.pieces[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_llama_imatrix_s_sums(
    architecture: str, engine: EmbeddedEngine, tools: BareTools, tiny_text: Path, tmp_path: Path
) -> None:
    """Dense, tied, fused, 3-D and expert weights, recurrent and hybrid: entries, shapes and counts equal, means within 5e-5."""
    model = write_architecture(architecture, tmp_path / "model.gguf")
    worst, _, _ = same_as_theirs(engine, tools, model, tiny_text, tmp_path, FEW, 7)
    print(f"{architecture}: largest relative difference {worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, ()),
        ({"n_batch": 128}, ("-b", "128")),
        ({"n_batch": 640, "n_ubatch": 100}, ("-b", "640", "-ub", "100")),
        ({"n_ctx": 512}, ()),
        ({"n_ctx": 1024, "n_batch": 512}, ("-b", "512")),
        ({"process_output": True}, ("--process-output",)),
        ({"parse_special": True}, ("--parse-special",)),
        ({"flash_attn": "off"}, ("-fa", "off")),
        ({"mmap": False}, ("-lm", "none")),
        ({"override_tensors": ("ffn_down=CPU",)}, ("-ot", "ffn_down=CPU")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_mean_what_they_mean_to_llama_imatrix(
    changes: dict[str, object], flags: tuple[str, ...], engine: EmbeddedEngine, tools: BareTools, tmp_path: Path
) -> None:
    model = write_llama_gguf(tmp_path / "model.gguf", dtype="f16", experts=4)
    options = replace(FEW, **changes)  # type: ignore[arg-type]
    worst, _, _ = same_as_theirs(engine, tools, model, resource(CALIBRATION_TEXT), tmp_path, options, 5, *flags)
    assert worst < TOLERANCE


@pytest.mark.parametrize(("n_ctx", "n_batch", "count"), [(512, 2048, 7), (128, 2048, 20), (1024, 512, 3), (50, 200, 9)])
def test_the_perplexity_is_llama_imatrix_s_to_the_digit(
    n_ctx: int, n_batch: int, count: int, engine: EmbeddedEngine, tools: BareTools, demo_model: Path, tmp_path: Path
) -> None:
    options = replace(FEW, n_ctx=n_ctx, n_batch=n_batch, ppl=True)
    text = resource(CALIBRATION_TEXT)
    printed: dict[int, str] = {}
    for attempt in range(10):  # it loses its last lines now and then
        folder = tmp_path / str(attempt)
        folder.mkdir()
        worst, printed, piece = same_as_theirs(engine, tools, demo_model, text, folder, options, count, "-b", str(n_batch))
        if count in printed:
            break
    assert worst < TOLERANCE
    assert f"{piece.perplexity.value:.4f}" == printed[count]
    assert piece.perplexity.tokens == count * options.scored_tokens
    assert piece.perplexity.error is not None


def test_ranges_in_any_order_are_those_chunks_alone(
    engine: EmbeddedEngine, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """One process computes many ranges; each file is what a process of its own would have written."""
    together = collected(engine, job(tiny_model, tiny_text, tmp_path / "together", FEW, (16, 16), (0, 16), (32, 5)))
    for piece in together.pieces:
        chunks = piece.chunks
        alone = collected(engine, job(tiny_model, tiny_text, tmp_path / f"{chunks.first}", FEW, (chunks.first, chunks.count)))
        theirs, ours = read(alone.pieces[0].path, exact=True).matrix, read(piece.path, exact=True).matrix
        assert all(np.array_equal(ours.entries[name].sums, theirs.entries[name].sums) for name in theirs.entries)
    told = [event.done for event in together.events if isinstance(event, Progress)]
    assert told == [16, 32, 37]


def test_perplexity_on_the_way_changes_no_sum(
    engine: EmbeddedEngine, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Without it the last product and the output projection are not computed; the sums must not notice."""
    paths = [
        collected(engine, job(tiny_model, tiny_text, tmp_path / str(ppl), replace(FEW, ppl=ppl), (0, 16))).pieces[0].path
        for ppl in (True, False)
    ]
    one, other = (read(path, exact=True).matrix for path in paths)
    assert all(np.array_equal(one.entries[name].sums, other.entries[name].sums) for name in one.entries)


def test_enough_ends_the_worker_early(engine: EmbeddedEngine, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    heard: list[CollectedRange] = []
    wanted = job(tiny_model, tiny_text, tmp_path / "out", FEW, (0, 16), (16, 16), (32, 8))
    engine.collect(wanted, ignore, lambda piece: heard.append(piece) or False)
    assert [piece.chunks for piece in heard] == [ChunkRange(0, 16)]


def test_a_stop_finishes_the_batch_and_the_rest_gives_the_same_bytes(
    bindings: Bindings, demo_model: Path, tmp_path: Path
) -> None:
    text, options = resource(CALIBRATION_TEXT), replace(FEW, n_ctx=256, n_batch=512, ppl=True)
    whole = collected(EmbeddedEngine(bindings, Runner()), job(demo_model, text, tmp_path / "whole", options, (0, 60)))
    stop = Stop()
    wanted = job(demo_model, text, tmp_path / "cut", options, (0, 60))

    def at_ten(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= 10:
            stop.request()

    with pytest.raises(InterruptedRunError):
        EmbeddedEngine(bindings, Runner(stop)).collect(wanted, at_ten, lambda piece: True)
    assert [path.suffix for path in wanted.folder.glob("0*")] == [".partial"]
    heard = collected(EmbeddedEngine(bindings, Runner()), wanted)
    done = [event.done for event in heard.events if isinstance(event, Progress)]
    assert done[0] > 10
    assert done[-1] == 60
    assert heard.pieces[0].perplexity == whole.pieces[0].perplexity
    one, other = read(heard.pieces[0].path, exact=True).matrix, read(whole.pieces[0].path, exact=True).matrix
    assert all(np.array_equal(one.entries[name].sums, other.entries[name].sums) for name in one.entries)
    assert not list(wanted.folder.glob("*.partial"))


def test_unfinished_work_of_another_job_is_not_continued(
    bindings: Bindings, engine: EmbeddedEngine, demo_model: Path, tmp_path: Path
) -> None:
    text, options = resource(CALIBRATION_TEXT), replace(FEW, n_ctx=512)
    whole = collected(engine, job(demo_model, text, tmp_path / "whole", options, (0, 60)))
    wanted = job(demo_model, text, tmp_path / "cut", options, (0, 60))
    stop = Stop()
    other = replace(wanted, fingerprint="another")
    with pytest.raises(InterruptedRunError):
        EmbeddedEngine(bindings, Runner(stop)).collect(other, lambda event: stop.request(), lambda piece: True)
    assert list(wanted.folder.glob("*.partial"))
    heard = collected(engine, wanted)
    ours, theirs = read(heard.pieces[0].path, exact=True).matrix, read(whole.pieces[0].path, exact=True).matrix
    assert all(np.array_equal(ours.entries[name].sums, theirs.entries[name].sums) for name in theirs.entries)


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_damaged_unfinished_work_is_done_again(
    damage: str, engine: EmbeddedEngine, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    whole = collected(engine, job(tiny_model, tiny_text, tmp_path / "whole", FEW, (0, 16)))
    wanted = job(tiny_model, tiny_text, tmp_path / "again", FEW, (0, 16))
    data = whole.pieces[0].path.read_bytes()
    damaged = {"cut": data[: len(data) // 2], "zeros": bytes(len(data))}[damage]
    (wanted.folder / "000000-000016.partial").write_bytes(damaged)
    heard = collected(engine, wanted)
    # Only the arrays: the files also hold the seconds that the work took.
    ours, theirs = read(heard.pieces[0].path, exact=True).matrix, read(whole.pieces[0].path, exact=True).matrix
    assert difference(ours, theirs) == 0


def spoiled(path: Path, tensor: str, number: float, rows: slice = slice(None)) -> Path:
    """A tiny model in float32, ``rows`` of one of whose tensors are ``number``."""
    from gguf import GGUFReader

    write_llama_gguf(path, dtype="f32")
    reader = GGUFReader(path, "r+")
    next(each for each in reader.tensors if each.name == tensor).data[rows] = number
    del reader
    return path


LOGITS = "its logits in chunk 1 are NaN or infinite"
HOLDS = ": its tensor {} contains such numbers"
INPUTS = "the activations that blk.1.ffn_down.weight meets in chunk 1 are NaN or infinite"


@pytest.mark.parametrize(
    ("tensor", "number", "why"),
    [
        ("blk.1.ffn_up.weight", np.inf, INPUTS + HOLDS.format("blk.1.ffn_up.weight")),
        ("output_norm.weight", np.nan, LOGITS + HOLDS.format("output_norm.weight")),
        ("output_norm.weight", 3e38, LOGITS),
    ],
)
@pytest.mark.parametrize("kind", ["embedded", "binaries"])
def test_a_model_that_computes_nan_stops_at_the_first_and_names_the_tensor(
    kind: str, tensor: str, number: float, why: str, engine: EmbeddedEngine, tools: BareTools, tiny_text: Path, tmp_path: Path
) -> None:
    model = spoiled(tmp_path / "model.gguf", tensor, number)
    used = engine if kind == "embedded" else BinariesEngine(tools.toolchain, Runner())
    heard = Heard()
    with pytest.raises(InvalidDataError) as caught:
        used.collect(job(model, tiny_text, tmp_path / "out", replace(FEW, ppl=True), (0, 8)), heard.events.append, heard.take)
    assert heard.pieces == []
    assert caught.value.what == "model.gguf produced NaN or infinite numbers"
    if kind == "binaries" and tensor.startswith(
        "blk."
    ):  # llama-imatrix does not say the chunk, and loses its last line at times
        assert tensor in caught.value.why
    else:
        assert caught.value.why == why


def test_the_first_chunk_with_nan_is_named(engine: EmbeddedEngine, tiny_text: Path, tmp_path: Path) -> None:
    """One token's embedding is NaN: the chunks before it compute."""
    from gguf import GGUFReader

    model = write_llama_gguf(tmp_path / "model.gguf", dtype="f32")
    told = engine.tokenise(model, [tiny_text.read_text(encoding="utf-8")], parse_special=False, log=None)
    place = next(at for at in range(300, len(told.ids)) if told.ids[at] not in told.ids[:at])
    reader = GGUFReader(model, "r+")
    next(each for each in reader.tensors if each.name == "token_embd.weight").data[told.ids[place]] = np.nan
    del reader
    with pytest.raises(InvalidDataError) as caught:
        engine.collect(job(model, tiny_text, tmp_path / "out", replace(FEW, n_batch=512), (0, 40)), ignore, lambda piece: True)
    numbers = [int(each) for each in re.findall(r"chunk (\d+)", caught.value.why)]
    assert numbers == [place // 128 + 1]
    assert caught.value.why.endswith("its tensor token_embd.weight contains such numbers")


def test_a_text_that_became_shorter_is_refused(engine: EmbeddedEngine, tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words " * 20, encoding="utf-8")
    with pytest.raises(InvalidDataError, match="too few for 12 chunks of 128"):
        engine.collect(job(tiny_model, text, tmp_path / "out", FEW, (0, 12)), ignore, lambda piece: True)


def test_a_file_that_is_no_model_is_refused(engine: EmbeddedEngine, tiny_text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises((EngineError, InvalidDataError)) as caught:
        engine.collect(job(model, tiny_text, tmp_path / "out", FEW, (0, 4)), ignore, lambda piece: True)
    assert caught.value.why
    assert "Traceback" not in caught.value.why


def test_tokens_are_counted_as_llama_tokenize_counts_them(
    engine: EmbeddedEngine, toolchain_tokens: int, demo_model: Path
) -> None:
    assert engine.count_tokens(demo_model, resource(CALIBRATION_TEXT), parse_special=False, log=None) == toolchain_tokens


@pytest.fixture
def toolchain_tokens(tools: BareTools, demo_model: Path) -> int:
    binaries = BinariesEngine(tools.toolchain, Runner())
    return binaries.count_tokens(demo_model, resource(CALIBRATION_TEXT), parse_special=False, log=None)


def test_a_request_too_long_for_a_command_line(engine: EmbeddedEngine, tiny_model: Path, tmp_path: Path) -> None:
    pins = tuple(f"^blk\\.{number}\\.a_rather_long_name_of_a_tensor$=q8_0" for number in range(4000))
    options = QuantizeOptions(tensor_types=(*pins, "ffn_down=q6_k"))
    jobs = [QuantizeJob("level", tiny_model, tmp_path / "out", kind, options, None, 1, None) for kind in ("Q4_0", "Q4_K_M")]
    for answer in engine.dry_runs(jobs, tmp_path / "log"):
        assert isinstance(answer, DryRun)
        assert answer.types["blk.0.ffn_down.weight"] == "q6_K"


def test_a_name_that_is_not_utf_8_is_refused_in_words(engine: EmbeddedEngine, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    model.symlink_to(tiny_model)
    with pytest.raises(InvalidDataError, match="is not UTF-8") as caught:
        engine.count_tokens(model, resource(CALIBRATION_TEXT), parse_special=False, log=None)
    assert "caf\\xe9.gguf" in caught.value.what


def in_worker(bindings: Bindings, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process like a worker's: native code stays out of the tests' own."""
    command = worker_command(ProbeJob(Path()), bindings.library)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=command.cwd,
        env=child_environment(command.env),
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


MOVED = """
import ctypes
from imatrix_runner.engines.worker import tensor_layout
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.refusal import Refusal
fields = list(tensor_layout.Tensor._fields_)
{change}
tensor_layout.Tensor = type("Tensor", (ctypes.Structure,), {{"_fields_": fields}})
try:
    tensor_layout.check_layout(load())
except Refusal as refusal:
    print(refusal.reply.exit_code, refusal.reply.why)
"""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("fields.insert(4, ('flags2', ctypes.c_int64))", "at "),
        ("fields[2] = ('ne', ctypes.c_int32 * 4)", "at "),
        ("fields[11] = ('name', ctypes.c_char * 128)", "(at size"),
        ("i = [f[0] for f in fields].index('view_src'); fields[i], fields[7] = fields[7], fields[i]", "src"),
    ],
)
def test_a_library_that_lays_tensors_out_differently_is_refused(change: str, named: str, bindings: Bindings) -> None:
    done = in_worker(bindings, MOVED.format(change=change))
    assert done.stdout.startswith("3 "), done.stderr[-500:]
    assert "has a different tensor layout" in done.stdout
    assert named in done.stdout


NOT_HOST = """
import sys
from pathlib import Path
from imatrix_runner.engines.jobs import ChunkRange, CollectJob, CollectOptions
from imatrix_runner.engines.worker import library
from imatrix_runner.engines.worker.collect import activations, collect_job
mode, model, text, folder = sys.argv[1:]
activations.Reader.on_host = lambda self, tensor: False
squares, reduced = activations.DeviceSums.squares, []
def counted(self, tensor):
    reduced.append(squares(self, tensor) if mode == "reduce" else None)
    return reduced[-1]
activations.DeviceSums.squares = counted
# ggml's own CPU buffers do not say which device they belong to; a GPU's do.
load = library.load()
load._declared["ggml_backend_buft_get_device"] = lambda kind: load.ggml("ggml_backend_dev_get")(0)
options = CollectOptions(n_ctx=128, threads=2, ppl=False)
job = CollectJob("s", Path(model), Path(text), (ChunkRange(0, 16),), Path(folder), options, "x", None)
collect_job.collect(job, lambda answer: None)
print(len(reduced), sum(value is not None for value in reduced))
"""


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "deepseek2"])
@pytest.mark.parametrize("mode", ["copy", "reduce"])
def test_activations_in_device_memory(
    mode: str, architecture: str, bindings: Bindings, engine: EmbeddedEngine, tiny_text: Path, tmp_path: Path
) -> None:
    """No GPU here: the CPU's buffers are said to be a device's. Copies go through ggml's own transfer, reductions through a
    graph of ours on a backend of that device."""
    model = write_architecture(architecture, tmp_path / "model.gguf")
    host = collected(engine, job(model, tiny_text, tmp_path / "host", FEW, (0, 16)))
    (tmp_path / "device").mkdir()
    command = worker_command(ProbeJob(tmp_path), bindings.library)
    with subprocess.Popen(
        [sys.executable, "-c", NOT_HOST, mode, str(model), str(tiny_text), str(tmp_path / "device")],
        cwd=command.cwd,
        env=child_environment(command.env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdout is not None
        said = child.stdout.read()
    asked, reduced = map(int, said.split())
    assert reduced == (asked if mode == "reduce" else 0)
    assert asked > 0
    worst = difference(
        read(tmp_path / "device" / "000000-000016.gguf", exact=True).matrix, read(host.pieces[0].path, exact=True).matrix
    )
    assert worst == 0 if mode == "copy" else 0 < worst < 1e-6


def test_a_dead_parent_ends_the_worker(bindings: Bindings, demo_model: Path, tmp_path: Path) -> None:
    """Its stdin ends with the parent: the worker finishes its batch, leaves what it has and goes."""

    text = resource(CALIBRATION_TEXT)
    asked = CollectJob("s", demo_model, text, (ChunkRange(0, 80),), tmp_path, replace(FEW, n_ctx=512), "x", None)
    command = worker_command(asked, bindings.library)
    child = subprocess.Popen(
        command.argv,
        cwd=command.cwd,
        env=child_environment(command.env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    while b"progress" not in child.stdout.readline():
        pass
    child.stdin.close()
    drained = threading.Thread(target=child.stdout.read)
    drained.start()
    assert child.wait(timeout=60) == 0
    drained.join()
    child.stdout.close()
    assert (tmp_path / "000000-000080.partial").exists()
