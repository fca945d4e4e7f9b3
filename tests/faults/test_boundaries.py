"""Everything that is read from outside, damaged by type: it is read as before or refused in words, never with a traceback.

Each boundary gets documents in which one value has another type, is missing, NaN, huge, negative, nested thousands deep, no
UTF-8, or a name such as ``../x`` (:mod:`support.mutations`). A reader may refuse with an error of this program, or take the
rest of the document for what it is; anything else that it raises is the fault that this looks for.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.app.status import list_workspaces
from imatrix_runner.audit.attestation import BuildIdentity, HashedFile, SayableRecipe, make_statement, read_statement
from imatrix_runner.batch.batch_journal import (
    BatchEvent,
    FileMade,
    ModelFailed,
    ModelPrepared,
    PlannedLevel,
    StageDone,
    ThreeLines,
    WatchBegan,
    WatchLooked,
    read_history,
)
from imatrix_runner.batch.batch_list import read_list
from imatrix_runner.chat.tokenizer_config import read_config, special_text
from imatrix_runner.cli.settings import FILE, find_settings
from imatrix_runner.documents.manifest import DocumentPlace, Manifest, SourceFacts, find_manifest, manifest_path
from imatrix_runner.engines import protocol
from imatrix_runner.engines.audit_jobs import AuditCandidate, CandidateFindings, TensorFindings
from imatrix_runner.engines.binaries.perplexity import DivergenceOutput
from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, TrialResult
from imatrix_runner.engines.covariance_jobs import WeightInput
from imatrix_runner.engines.embedded.replies import Replies
from imatrix_runner.engines.files import covariance_file, ledger
from imatrix_runner.engines.files.completions import CompletionsFile, read_completions
from imatrix_runner.engines.files.cost_files import CostFile, read_costs
from imatrix_runner.engines.files.logits import LogitsHead, first_invalid_chunk, read_head, read_tokens
from imatrix_runner.engines.jobs import (
    ChunkRange,
    CollectedRange,
    CollectJob,
    CollectOptions,
    Fallback,
    PassedLevel,
    PassedUnit,
    PassFigures,
    Perplexity,
)
from imatrix_runner.engines.llama_cpp.output import ImatrixOutput, QuantizeOutput, parse_token_ids
from imatrix_runner.engines.measures import Completion
from imatrix_runner.engines.pass_parts import LedgerEntry, PassWork, WantedPair, WantedPlace, WrittenPair
from imatrix_runner.engines.protocol import decode_job, decode_reply, encode, encode_job
from imatrix_runner.engines.speed_jobs import MemoryBuffer, TimedRuns
from imatrix_runner.engines.worker.collect.covariance_callback import InputSums
from imatrix_runner.engines.worker.collect.unfinished_sums import find_unfinished, save_unfinished
from imatrix_runner.errors import DownloadError, EngineError, InvalidDataError, RunnerError
from imatrix_runner.evaluate.measurements import answered, comparisons, levels_made, measured
from imatrix_runner.events import Metric, Notice, Progress, ignore
from imatrix_runner.files import Stamp
from imatrix_runner.imatrix import checkpoint as checkpoints
from imatrix_runner.imatrix.convergence import Point
from imatrix_runner.imatrix.formats import prepare_gguf
from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.models.hub.announcements import Announcements, parse_place
from imatrix_runner.models.hub.dataset_tables import DatasetId
from imatrix_runner.models.hub.datasets import fetch_dataset
from imatrix_runner.models.hub.publishing import PublishingHub
from imatrix_runner.models.hub.remote_repository import RemoteRepository, commits, tree
from imatrix_runner.models.hub.search import Hub
from imatrix_runner.models.origin import origin_of_directory
from imatrix_runner.models.safetensors_file import INDEX, check_safetensors, read_directory, read_model_json
from imatrix_runner.quantize.build_recipe import (
    BuildRecipe,
    RecipeFile,
    RecipeLine,
    RecipeOptions,
    as_bytes,
    read_build_recipe,
)
from imatrix_runner.quantize.level_facts import facts_of_level
from imatrix_runner.report.document import encode_report, read_report
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.release import parse_release
from imatrix_runner.untrusted import (
    MAX_DEPTH,
    UnreadableError,
    as_type,
    first_non_finite,
    from_json,
    from_lenient_json,
    from_toml,
    from_yaml,
)
from imatrix_runner.workspace import Workspace, read_owner
from support.command_line import RunCommand
from support.hub_server import HubServer, be_quick_and_anonymous
from support.in_process import CommandLine
from support.mutations import DEEP, VALUES, as_json, typed_mutations
from support.reports import divergence, sample_report
from support.synthetic import expected
from support.tiny_models import write_hf_directory
from support.workspaces import compare_and_answer, measure, run_here

SEED, COUNT = 20261130, 150


def survived(what: str, use: Callable[[], Any]) -> bool:
    """Whether ``use`` took the value; an error of this program is the other good ending."""
    refused: RunnerError | None = None
    try:
        use()
    except RunnerError as error:
        refused = error
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    if refused is not None:
        told = (refused.what, refused.why, refused.todo)
        assert all(told), what
        assert " ".join(told).replace("\n", "").isprintable(), what
        assert refused.exit_code != 1, what
    return refused is None


def survived_all(document: Any, use: Callable[[bytes], Any], count: int = COUNT) -> None:
    """Use every mutation of a document; some are taken, and some refused."""
    taken = [survived(what, partial(use, data)) for what, data in typed_mutations(document, SEED, count)]
    assert survived("as it was", partial(use, as_json(document)))
    assert not all(taken), "every damaged document was taken"


def plain(value: Any) -> Any:
    """A value as its JSON has it."""
    return json.loads(msgspec.json.encode(value))


def an_error(number: int = 0) -> RoundingError:
    return RoundingError(RoundedTensor(f"blk.{number}.attn_q.weight", "q4_K"), 1.25, 0.5, 100.0)


def a_result() -> TrialResult:
    return TrialResult("probe", (3, 0), (255, 255), (0.5, -1e-9), (250, 255), (900.0, 800.0), (890.5, 800.0))


# -- the decoder itself ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [value for value in VALUES if not isinstance(value, (dict, list))], ids=repr)
def test_what_json_does_not_have_is_named(value: Any) -> None:
    data = as_json({"a": value})
    why = ""
    try:
        assert json.dumps(from_json(data, dict[str, Any])) == data.decode()
    except UnreadableError as error:
        why = str(error)
    beyond = isinstance(value, float) and not np.isfinite(value)
    assert why.startswith(("it holds", "it is nested")) == (beyond or value in (DEEP, "\ud800"))


def test_depth_is_bounded_everywhere() -> None:
    for depth in (MAX_DEPTH + 1, 5000, 200_000):
        deep = b"[" * depth + b"]" * depth
        for read in (partial(from_json, kind=Any), from_lenient_json, lambda data: from_toml(b"a = " + data), from_yaml):
            with pytest.raises(UnreadableError, match="levels deep"):
                read(deep)
    assert from_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, Any)
    value: Any = 1
    for _ in range(MAX_DEPTH + 1):
        value = [value]
    with pytest.raises(UnreadableError, match="levels deep"):
        as_type(value, Any)


# -- the worker --------------------------------------------------------------------------------------------------------------

ANSWERS: tuple[protocol.Reply, ...] = (
    protocol.Proven("0.3", Path("/lib"), "1", "AVX = 1", ("CPU",), ("cpu",), {"Q4_0": 2}),
    protocol.Counted(3),
    protocol.Tokenized(10, {1: "<s>"}, 1, 2, True),
    protocol.Collected(0, 4, Path("/x"), 1.0, 0.5, 2.0, 4.0, 12, 0.1),
    protocol.CovariancesCollected(True, 2, 1.0, 0.5),
    protocol.TokensMeasured(4, True, 1.0, 0.5),
    protocol.Answered(4, True, 1.0, 0.5),
    protocol.Planned({"a": "q4_0"}, (Fallback("a", "q2_K", "q4_0"),), False),
    protocol.Passed(PassedLevel("Q4_0"), PassFigures(1, 2, (), 3, 4, 5, 6, 7)),
    protocol.Prepared((PassWork("a", 64, 128, (WantedPair("q4_0", 36, (WantedPlace("Q4_0", 0, 96),)),)),), 32),
    protocol.UnitPassed(
        PassedUnit(
            3, (WrittenPair({"Q4_0": LedgerEntry("a", "q4_0", "", 0, 96, 36, 7)}, 36),), PassFigures(1, 2, (), 3, 4, 5, 6, 7)
        )
    ),
    protocol.Checked("", ""),
    protocol.Costed(done=True),
    protocol.TensorAudited(
        TensorFindings("a", "q4_K", "bf16", 4, 8, 2048, False, 0, (CandidateFindings(AuditCandidate(0), 3, 9, 1.5, 1.0, 0.9),))
    ),
    protocol.Audited(done=True),
    protocol.Timed(TimedRuns((9.5,), (2.5,), (MemoryBuffer("KV", "CPU", 64),), 2), done=True),
    protocol.Failed("what", "why", "do", 6),
    Progress("step", 1.0, 2.0),
    Metric("step", "ppl", 7.5),
    Notice("info", "text"),
)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_a_worker_s_answer(answer: protocol.Reply) -> None:
    assert decode_reply(encode(answer).decode()) == answer

    def use(data: bytes) -> None:
        answers = Replies(lambda heard: encode(heard))
        answers.feed("stdout", data.decode() + "\n")

    survived_all(json.loads(encode(answer)), use, 60)


def test_a_job() -> None:
    options = CollectOptions(n_ctx=128, threads=2)
    job = CollectJob("step", Path("/m"), Path("/t"), (ChunkRange(0, 4),), Path("/f"), options, "print", None)

    def use(data: bytes) -> None:
        try:
            decode_job(data.decode())
        except UnreadableError as error:
            raise InvalidDataError("a job", str(error), "x") from error

    survived_all(json.loads(encode_job(job)), use)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have_are_never_sent_as_null(number: float) -> None:
    for message in (Metric("step", "ppl", number), replace_nll(number), Progress("step", number)):
        with pytest.raises(InvalidDataError, match="NaN or infinite"):
            encode(message)


def replace_nll(number: float) -> protocol.Collected:
    return protocol.Collected(0, 4, Path("/x"), 1.0, 0.5, number, 4.0, 12, 0.1)


def test_an_endless_line_is_cut() -> None:
    answers = Replies()
    for _ in range(protocol.MOST_BYTES >> 22):
        answers.feed("stdout", "x" * (4 << 20))
    with pytest.raises(EngineError, match="could not be read"):
        answers.feed("stdout", "x")


# -- the workspace -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_text: Path) -> Workspace:
    folder = tmp_path_factory.mktemp("made")
    made = run_here(folder, "run", tiny_model, "-f", tiny_text, "--levels", "Q8_0,IQ2_XS", "-c", "128", "--chunks", "8")
    measure(made, {"Q8_0": 0.001, "IQ2_XS": 0.4})
    compare_and_answer(made, "IQ2_XS")
    return made


def test_a_journal(workspace: Workspace) -> None:
    """What is kept of steps is looked at by its readers, step by step."""
    document = json.loads(workspace.journal.read_bytes())
    copy = workspace.root.parent / "copy" / "journal.json"
    copy.parent.mkdir()

    def use(data: bytes) -> None:
        copy.write_bytes(data)
        journal = Journal(copy)
        for record in levels_made(journal).values():
            facts_of_level(record)
        for read in (measured, comparisons, answered):
            read(journal)
        list_workspaces(copy.parent.parent)

    survived_all(document, use, 300)


@pytest.mark.parametrize("command", ["report", "status", "quantize"])
def test_a_journal_behind_the_command_line(command: str, workspace: Workspace, tiny_model: Path, cli: CommandLine) -> None:
    arguments = {
        "report": ("report", workspace.root, "-q"),
        "status": ("status", "--work-dir", workspace.root.parent),
        "quantize": ("quantize", tiny_model, "--levels", "Q8_0,IQ2_XS", "--dry-run", "-q", "--work-dir", workspace.root.parent),
    }[command]
    whole = workspace.journal.read_bytes()
    try:
        for what, data in typed_mutations(json.loads(whole), SEED + 1, 15):
            for made in workspace.root.glob("report.*"):
                made.unlink()
            workspace.journal.write_bytes(data)
            done = cli(*arguments)
            assert done.code in (0, 6), (what, done.err)
            assert (done.out + done.err).replace("\n", "").isprintable(), what
    finally:
        workspace.journal.write_bytes(whole)


def test_figures_that_are_nan_are_not_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.json")
    facts = replace(divergence(0.1), correlation=float("nan"))
    with pytest.raises(InvalidDataError, match="cannot be stored") as caught:
        journal.record("evaluate Q4_0", StepRecord.now({}, [], "asked for", 1.0, facts=facts))
    assert "correlation" in caught.value.why
    assert not (tmp_path / "journal.json").exists()


def test_an_owner(tmp_path: Path) -> None:
    owned = Workspace(tmp_path, "m")
    document = {
        "pid": 1,
        "created": 1.5,
        "host": "h",
        "command": "c",
        "started": "s",
        "children": {"7": 1.5},
        "workspace": "1:2",
    }
    document["host"] = socket.gethostname()
    found = []
    for _, data in typed_mutations(document, SEED, 2 * COUNT):
        owned.owner.write_bytes(data)
        found.append(read_owner(owned))
        assert found[-1] is None or found[-1].alive in (True, False)
    assert None in found


def test_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    head = ledger.LedgerHead(ledger.VERSION, "lineage", "print", 32)
    entry = LedgerEntry("blk.0.attn_q.weight", "q4_K", "none", 0, 0, 144, 7)
    counts = set()
    for number, document in enumerate((head, entry)):
        for what, data in typed_mutations(plain(document), SEED, COUNT):
            lines = [data if number == 0 else plain_line(head), data if number == 1 else plain_line(entry), plain_line(entry)]
            path.write_bytes(b"\n".join([*lines, b""]))
            try:
                found = ledger.read(path)
            except Exception as error:
                raise AssertionError(what) from error
            counts.add(None if found is None else len(found[1]))
    assert {None, 0, 1} <= counts


@pytest.mark.parametrize("record", [an_error(), a_result()], ids=lambda record: type(record).__name__)
def test_a_file_of_costs(record: RoundingError | TrialResult, tmp_path: Path) -> None:
    """Damaged with a checksum that is right: taken as it is, or not counted, and the writer agrees with the reader."""
    kind = type(record)
    path = tmp_path / "costs"
    with closing(CostFile(path, "print", kind)) as file:
        file.append([record])
    head, line, _ = path.read_bytes().split(b"\n")
    for document in (json.loads(head), json.loads(line)["record"]):
        taken = set()
        for what, data in typed_mutations(document, SEED, COUNT):
            damaged = b'{"crc":%d,"record":%s}' % (zlib.crc32(data), data)
            path.write_bytes(b"\n".join([head, damaged, line, b""] if "records" not in document else [data, line, b""]))
            try:
                found = read_costs(path, "print", kind)
                with closing(CostFile(path, "print", kind)) as file:
                    assert tuple(file.records) == found, what
                    file.append([record])
            except Exception as error:
                raise AssertionError(what) from error
            assert read_costs(path, "print", kind) == (*found, record), what
            assert all(first_non_finite(each) is None for each in found), what
            taken.add(len(found))
        assert taken <= {0, 1, 2}
        assert 0 in taken


def test_lines_of_costs_that_are_torn_or_damaged(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed: records before it count, those after it do not."""
    path, draw = tmp_path / "costs", random.Random(SEED)
    records = [an_error(number) for number in range(3)]
    with closing(CostFile(path, "print", RoundingError)) as file:
        file.append(records)
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for at in range(len(whole)):
        before = max(0, sum(end <= at for end in ends) - 1)
        path.write_bytes(whole[:at])
        assert read_costs(path, "print", RoundingError) == tuple(records[:before])
        other = bytes([whole[at] ^ (1 << draw.randrange(8))])
        path.write_bytes(whole[:at] + other + whole[at + 1 :])
        found = read_costs(path, "print", RoundingError)
        assert found == tuple(records[: before if at >= ends[0] else 0])
    for fingerprint, kind in (("other", RoundingError), ("print", TrialResult)):
        path.write_bytes(whole)
        assert read_costs(path, fingerprint, kind) == ()
    assert read_costs(tmp_path, "print", RoundingError) == read_costs(tmp_path / "none", "print", RoundingError) == ()


@pytest.mark.parametrize(("number", "why"), [(float("inf"), "NaN or infinity in squared"), (-1.0, "a negative error")])
def test_costs_that_a_reader_would_not_believe_are_not_written(number: float, why: str, tmp_path: Path) -> None:
    with closing(CostFile(tmp_path / "costs", "print", RoundingError)) as file:
        with pytest.raises(InvalidDataError, match="impossible") as caught:
            file.append([an_error(), replace(an_error(1), squared=number)])
        assert caught.value.why == f"blk.1.attn_q.weight has {why}"
    assert read_costs(tmp_path / "costs", "print", RoundingError) == ()


def test_files_of_covariances(tmp_path: Path) -> None:
    """Heads, and the list of a set: taken for what they are, or refused; no size that they claim is believed."""
    sums, path, unfinished = np.ones(6), tmp_path / covariance_file.file_name(0), tmp_path / "sums"
    head = covariance_file.CovarianceHead(covariance_file.VERSION, "print", ("blk.0.attn_q.weight",), 3, (5, 7))
    covariance_file.write_covariance(path, head, lambda _: sums)
    covariance_file.write_covariance_index(tmp_path, "print", {path.name: head})
    index, data = tmp_path / covariance_file.INDEX, path.read_bytes()
    listed, rest = index.read_bytes(), data[data.index(b"\n") + 1 :]
    outcomes = set[str]()
    for what, damaged in typed_mutations(plain(head), SEED, COUNT):
        path.write_bytes(damaged + b"\n" + rest)
        try:
            outcomes.add(f"read {covariance_file.read_covariance(path, 1).shape}")
        except InvalidDataError:
            outcomes.add("refused")
        except Exception as error:
            raise AssertionError(what) from error
        outcomes.add(f"listed {len(covariance_file.stored_covariances(tmp_path))}")
    path.write_bytes(data)
    for what, damaged in typed_mutations(json.loads(listed), SEED, COUNT):
        index.write_bytes(damaged)
        try:
            outcomes.add(f"listed {len(covariance_file.stored_covariances(tmp_path))}")
            covariance_file.set_fingerprint(tmp_path)
        except Exception as error:
            raise AssertionError(what) from error
    assert outcomes == {"read (3, 3)", "refused", "listed 0", "listed 1"}
    sums_of = InputSums.zero(WeightInput(("blk.0.attn_q.weight",), 3, 2))
    save_unfinished(unfinished, "print", 2, [sums_of])
    data = unfinished.read_bytes()
    counts = set()
    for what, damaged in typed_mutations(json.loads(data[: data.index(b"\n")]), SEED, COUNT):
        unfinished.write_bytes(damaged + data[data.index(b"\n") :])
        try:
            found = find_unfinished(unfinished, "print")
            counts.add(found is not None and found.load(found.inputs) is not None)
        except Exception as error:
            raise AssertionError(what) from error
    assert counts == {False, True}


def plain_line(value: Any) -> bytes:
    return msgspec.json.encode(value)


def test_a_checkpoint_s_state(tmp_path: Path) -> None:
    """With a checksum that is right: as another program, or a later one of this kind, would write it."""
    piece = CollectedRange(ChunkRange(0, 3), Path("unused"), 1.25, 0.5, Perplexity(1.1, 2.2, 33))
    matrix = expected([ChunkRange(0, 3)])
    made = checkpoints.Checkpoint({"model file": "sha256:a"}).with_range(piece, matrix, Point(3, 0.1, "blk.0.attn_q", 0.3))
    assert made.matrix is not None
    part = checkpoints.prepare(made, tmp_path / "whole.gguf")
    state = json.loads(checkpoints.read_header(part).metadata["imatrix_runner.checkpoint"])
    path = tmp_path / "checkpoint.gguf"

    def use(data: bytes) -> None:
        assert made.matrix is not None
        text = data.decode()
        summed = checkpoints._Checked(made.matrix.entries, made.matrix)
        again = prepare_gguf(replace(made.matrix, entries=summed), path, exact=True, facts={"imatrix_runner.checkpoint": text})
        with again.open("ab") as handle:
            handle.write(struct.pack("<12sI", b"imatrix crc\n", summed.checksum(text)))
        again.replace(path)
        checkpoints.load(path)
        checkpoints.resume(path, {"model file": "sha256:a"}, [ChunkRange(0, 3)])

    survived_all(state, use, 100)


def test_a_manifest(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"some text")
    source = SourceFacts("a.jsonl", "jsonl", "0" * 64, "mit", 1.0, 1.0, 3, 2, 9, None)
    place = DocumentPlace(0, 9, 0)
    manifest = Manifest("text.txt", 9, "0" * 64, False, 0, True, False, 512, None, None, "", None, (source,), (place,))

    def use(data: bytes) -> None:
        manifest_path(text).write_bytes(data)
        found = find_manifest(text)
        assert found is None or found.fingerprint

    survived_all(plain(manifest), use, 300)


def test_an_attestation(tmp_path: Path) -> None:
    path = tmp_path / "m.derivation.json"
    file, source = HashedFile("m.gguf", "1" * 64, 9), HashedFile("m-BF16.gguf", "2" * 64, 18)
    imatrix = HashedFile("imatrix.gguf", "3" * 64, 4)
    build = BuildIdentity("llama-cpp-python", "4" * 64, "off")
    content = make_statement(file, source, SayableRecipe("Q4_K_M", "q8_0", "q8_0"), imatrix, build)

    def use(data: bytes) -> None:
        path.write_bytes(data)
        statement = read_statement(path)
        names = (statement.file.name, statement.source.name)
        assert all("/" not in name and len(statement.file.sha256) == 64 for name in names)

    use(content)
    survived_all(json.loads(content), use, 300)


def test_a_recipe_of_a_level(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf.recipe.json"
    recipe = BuildRecipe(
        level="Q4_0",
        files=(RecipeFile("m.gguf", 9, "1" * 64),),
        source=(RecipeFile("m-BF16.gguf", 18, "2" * 64),),
        imatrix=RecipeFile("imatrix.gguf", 4, "3" * 64),
        ftype="Q4_0",
        options=RecipeOptions(exclude_weights=("b",), override_kv=("a=int:1",)),
        tensors=(RecipeLine("a", "q4_0"), RecipeLine("b", "q4_0", "c", "refined")),
        engine="llama-cpp-python",
    )

    def use(data: bytes) -> None:
        path.write_bytes(data)
        found = read_build_recipe(path)
        assert all("/" not in each.name for each in (*found.files, *found.source))
        assert len([line.target() for line in found.tensors]) == len(found.tensors)

    use(as_bytes(recipe))
    survived_all(json.loads(as_bytes(recipe)), use, 300)


def test_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"

    def use(data: bytes) -> None:
        path.write_bytes(data)
        encode_report(read_report(path))

    survived_all(json.loads(encode_report(sample_report())), use)


def test_answers_of_models_that_another_program_sealed(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    CompletionsFile(path, "print").close()
    head = path.read_bytes()
    record = plain([Completion(0, 3, (1, 2), True, "text")])
    for what, data in typed_mutations(record, SEED, COUNT):
        try:
            packed = msgspec.msgpack.encode(json.loads(data))
        except (ValueError, RecursionError, OverflowError):
            continue  # MessagePack cannot hold it either
        path.write_bytes(head + len(packed).to_bytes(4, "little") + packed + zlib.crc32(packed).to_bytes(4, "little"))
        assert survived(what, partial(read_completions, path, "print"))


@pytest.mark.parametrize("cut", [0, 7, 20, 100])
def test_a_file_of_log_probabilities(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "base.logits"
    numbers = (0, 1, -1, 3, 512, 1 << 20, (1 << 31) - 1, -(1 << 31))
    taken = 0
    for n_ctx in numbers:
        for n_vocab in numbers:
            for n_chunks in (1, 2, -1, (1 << 31) - 1):
                data = struct.pack("<8sIii", b"_logits_", n_ctx % (1 << 32), n_vocab, n_chunks)
                path.write_bytes((data + bytes(64))[: len(data) + 64 - cut] if cut < 64 else data[:cut])

                def use() -> None:
                    head = read_head(path)
                    read_tokens(path, head)
                    first_invalid_chunk(path, head)

                taken += survived(f"{n_ctx} {n_vocab} {n_chunks}", use)
    assert taken == 0
    head = LogitsHead(8, 5, 2)
    path.write_bytes((head.pack() + bytes(head.n_bytes))[: head.n_bytes])
    assert read_head(path) == head


# -- headers and configurations ----------------------------------------------------------------------------------------------


def test_a_safetensors_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "model.a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "model.b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }

    def use(data: bytes) -> None:
        path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(32))
        for weight in read_directory(path):
            assert weight.n_elements >= 0

    survived_all(header, use, 400)


def test_an_index_and_configurations(tmp_path: Path) -> None:
    directory = write_hf_directory(tmp_path / "model", layers=1, shards=2)
    for name in (INDEX, "config.json", "tokenizer_config.json"):
        path = directory / name
        whole = path.read_bytes()

        def use(data: bytes, path: Path = path) -> None:
            path.write_bytes(data)
            check_safetensors(directory)
            read_model_json(directory / "config.json")
            origin_of_directory(directory)
            special_text(read_config(directory / "tokenizer_config.json"), "bos_token")

        survived_all(json.loads(whole), use, 100)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "option",
    [
        "-j",
        "--prune-layers",
        "-ngl",
        "--threads",
        "--chunks",
        "-c",
        "--timeout",
        "--seed",
        "--max-buffer-size",
        "--override-kv",
    ],
)
def test_numbers_that_no_option_holds(option: str, cli: CommandLine) -> None:
    """The model is not there: what is wrong with the number is found before, or nothing is done with it."""
    for value in ("9" * 5000, "9" * 30, "-1", "nan", "inf", "1e400", "", "\x1b[2J", "general.alignment=int:" + "9" * 5000):
        done = cli("run", "not-there.gguf", "--levels", "Q4_0", "--dry-run", option, value)
        assert done.code in (2, 6), (value, done.err)


def test_settings(tmp_path: Path, cli: CommandLine) -> None:
    values = (
        *("true", "nan", "-inf", "0", "-1", "1.5", "9" * 40, "'x'", "''", '"\\u0000"', '"\\u001b[2J"', "[]", "[[1]]", "{}"),
        *("1979-05-27", "[" * 5000 + "]" * 5000, "'../../x'", "[1, 'a', true]", "{a.b = 1}", "'" + "x" * 5000 + "'"),
    )
    keys = ("work-dir", "levels", "jobs", "chunks", "timeout", "pure", "tensor-type", "text", "threads", "gpu-layers")
    codes = set()
    for key in keys:
        for value in values:
            (tmp_path / FILE).write_text(f"{key} = {value}\n", encoding="utf-8")
            done = cli("run", "--show-config", "--json")
            assert done.code in (0, 2, 6), (key, value, done.err)
            assert done.err.replace("\n", "").isprintable()
            codes.add(done.code)
    assert codes == {0, 2, 6}


@pytest.mark.parametrize(
    "text",
    [
        "tool = 5",
        "[tool]\nimatrix-runner = 5",
        "[tool]\nimatrix-runner = []",
        "[[tool]]",
        "x",
        "\udcff",
        "[tool" + ".a" * 3000 + "]",
    ],
)
def test_a_pyproject(text: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    survived(text[:40], lambda: find_settings(tmp_path))


def test_a_release() -> None:
    asset = {"name": "llama-b1-bin-ubuntu-x64.zip", "size": 5, "browser_download_url": "https://host/x", "digest": "sha256:0"}

    def use(data: bytes) -> None:
        try:
            document = from_lenient_json(data)
        except UnreadableError as error:
            raise InvalidDataError("a release", str(error), "x") from error
        release = parse_release(document, "https://host/")
        assert all(each.name.isprintable() and each.size >= 0 for each in release.assets)
        assert release.tag.isprintable()

    survived_all({"tag_name": "b1", "assets": [asset]}, use)


# -- lists of models ---------------------------------------------------------------------------------------------------------


def test_a_list_of_models(tmp_path: Path) -> None:
    entry = {"model": "org/name", "levels": ["Q4_0"], "evaluate": True, "priority": 3, "publish": "me/x", "threads": 1}
    path = tmp_path / "list.jsonl"
    known = frozenset(("levels", "evaluate", "threads"))

    def use(data: bytes) -> None:
        path.write_bytes(data + b"\n")
        for found in read_list(path, known):
            assert found.model.isprintable()
            assert found.fingerprint

    survived_all(entry, use)


EVENTS: tuple[BatchEvent, ...] = (
    ModelPrepared("a", "e", "work/a", 100, False, (PlannedLevel("Q4_0", 10),)),
    StageDone("a", "e", "make", ("Q4_0",), 3.0, 110, ("Q4_0",)),
    ModelFailed("a", "e", "check", ThreeLines("usage", "what", "why", "do")),
    FileMade("a", "level", "/x", Stamp(1, 2, 3, "s"), "Q4_0"),
    WatchBegan("org", ("org/name",), "2026-01-01"),
    WatchLooked("org", "2026-01-01", 5, ("org/name",), "why"),
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_batch_s_journal(event: BatchEvent, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"

    def use(data: bytes) -> None:
        path.write_bytes(data + b"\n")
        read_history(path)

    survived_all(plain(event), use)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    be_quick_and_anonymous(monkeypatch, tmp_path)
    with HubServer() as server:
        yield server


LISTED = {
    "id": "org/name",
    "sha": "a" * 40,
    "private": False,
    "gated": False,
    "tags": ["base_model:quantized:org/base", "gguf"],
    "lastModified": "2026-01-01T00:00:00.000Z",
    "cardData": {"license": "mit", "base_model": ["org/base"]},
    "config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "gguf": {"total": 5, "architecture": "llama"},
    "siblings": [
        {"rfilename": "a.gguf", "size": 5, "blobId": "x", "lfs": {"size": 5, "sha256": "b" * 64, "pointerSize": 3}},
        {"rfilename": "train.jsonl", "size": 9},
    ],
}


@pytest.mark.parametrize("asked", ["repository", "search", "data set"])
def test_a_hub_s_answer(asked: str, hub: HubServer, tmp_path: Path) -> None:
    client = Hub(Stop(), ignore, hub.endpoint, tmp_path / "cache", offline=False)

    def use(data: bytes) -> None:
        hub.trouble.answer = data
        if asked == "data set":
            fetch_dataset(client, DatasetId("org/name"))
        found = client.made_from("org/base") if asked == "search" else (client.repository("org/name"),)
        for listing in found:
            texts = (listing.repo, listing.commit, listing.date or "", listing.licence or "", listing.base_model or "")
            assert listing.n_params is None or listing.n_params > 0
            assert "".join((listing.architecture, *texts, *(file.name for file in listing.files))).isprintable()
            assert all(".." not in file.name.split("/") and (file.size or 0) >= 0 for file in listing.files)

    document = [LISTED] if asked == "search" else LISTED
    taken = [survived(what, partial(use, data)) for what, data in typed_mutations(document, SEED, 120)]
    assert not all(taken)
    assert any(taken) or asked == "data set"  # whose files are not there: only the listing is answered


COLLECTED = {"items": [{"_id": "0" * 24, "id": "org/name", "type": "model", "lastModified": "2026-01-01T00:00:00.000Z"}]}


@pytest.mark.parametrize("asked", ["org", "trending", "org/best-" + "0" * 24, "a model"])
def test_what_a_hub_announces(asked: str, hub: HubServer) -> None:
    """A part of a model's description that is not a hub's counts as not announced; so one model cannot hide the others."""
    announcements = Announcements(Stop(), endpoint=hub.endpoint)
    described = {**LISTED, "createdAt": "2026-01-01T00:00:00.000Z", "disabled": False}

    def use(data: bytes) -> None:
        hub.trouble.answer = data
        is_one = asked == "a model"
        found = [announcements.describe("org/name")] if is_one else announcements.at(parse_place(asked), lambda _repo: False)
        for each in found:
            texts = (
                each.repo,
                each.version,
                each.created,
                each.architecture,
                *each.architectures,
                *each.licences,
                each.problem,
            )
            assert "".join(texts).isprintable()
            assert all(len(text) <= 301 for text in texts)
            assert each.n_params is None or each.n_params > 0
            assert ".." not in each.repo.split("/")

    document: object = described if asked == "a model" else COLLECTED if "/" in asked else [described]
    taken = [survived(what, partial(use, data)) for what, data in typed_mutations(document, SEED, 60)]
    assert not all(taken)
    assert any(taken)


ACCOUNT = {
    "name": "me",
    "orgs": [{"name": "org", "roleInOrg": "write"}],
    "auth": {"accessToken": {"role": "write", "displayName": "x"}},
}
TREE = [
    {"type": "file", "path": "a.gguf", "size": 5, "oid": "c" * 40, "lfs": {"oid": "b" * 64, "size": 5, "pointerSize": 3}},
    {"type": "file", "path": "README.md", "size": 9, "oid": "d" * 40},
]
COMMITS = [{"id": "a" * 40, "title": "Upload", "message": "", "authors": [{"user": "me"}], "date": "2026-01-01T00:00:00.000Z"}]


@pytest.mark.parametrize("document", [LISTED, ACCOUNT, TREE, COMMITS], ids=["repository", "account", "tree", "commits"])
def test_a_hub_s_answer_to_who_publishes(document: object, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_tests")
    client = PublishingHub(Stop(), ignore, hub.endpoint)
    missing = RemoteRepository("org/name", exists=False)

    def use(data: bytes) -> None:
        hub.trouble.answer = data
        if document is ACCOUNT:
            client.require_access(missing)
            return
        found = tree(client.asked("org/name"), "a" * 40) if document is TREE else []
        assert all(".." not in file.name.split("/") and file.n_bytes >= 0 for file in found)
        if document is COMMITS:
            assert all(len(each.commit) == 40 for each in commits(client.asked("org/name")))
        elif document is LISTED:
            client.look("org/name")

    taken = [survived(what, partial(use, data)) for what, data in typed_mutations(document, SEED, 60)]
    assert not all(taken)
    assert any(taken) or document is LISTED  # whose tree is not one


@pytest.mark.parametrize("address", ["http://[", "http://host:99999999", "http://", "nonsense"])
def test_an_address_of_a_hub_that_is_none(address: str, runner: RunCommand) -> None:
    """In a process of its own: the library reads it when it is imported, and raises there."""
    done = runner("run", "org/name", "--levels", "Q4_0", env={"HF_ENDPOINT": address})
    assert done.code in (2, 4), done.err
    assert "HF_ENDPOINT is not a web address" in done.err


@pytest.mark.parametrize("etag", ["../../../escaped", "a/b", "..\\..\\escaped", "x" * 300])
def test_an_etag_that_is_a_path_is_not_written_to(etag: str, hub: HubServer, tmp_path: Path) -> None:
    """The library names files of its cache by it, and looks neither for dots nor for slashes."""
    hub.add("org/name", {"a.imatrix": b"content"})
    hub.trouble.etag = etag
    client = Hub(Stop(), ignore, hub.endpoint, tmp_path / "cache" / "hub", offline=False)
    listing = client.repository("org/name")
    with pytest.raises(DownloadError, match="does not answer like a hub"):
        client.fetch(listing, listing.files[0], limit=1 << 20)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"content"] == []


# -- what llama.cpp's programs print -----------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *("[1]", "[2]12.5,", "[", "]", "nan", "inf", "-nan", "9" * 5000, "-1", "±", "\n", "\r", " ", ",", "%", "\x1b[2J", "\0"),
        *(
            "compute_imatrix: computing over 8 chunks, n_ctx=128, batch_size=2048, n_seq=1",
            "collect_imatrix[3]:",
            "Mean    KLD:",
        ),
        *(
            "[   1/  20] token_embd.weight - [ 256, 512, 1, 1], type = bf16,",
            "size = 1.00 MiB -> 0.50 MiB (q4_0)",
            "size = 1 MiB",
        ),
        *(
            "converting to q4_0 ..",
            "did not find weights for x",
            "tensor 'x' has invalid data",
            "   1 137.9 ± 26 0.001 ± 0.008 ",
        ),
        "warning: x - ncols 5 not divisible by 32 (required for type q4_0) -> falling back to q8_0",
        *(
            "Same top p: 91.961 ± 0.602 %",
            "kl_divergence: failed to open",
            f"[ {'9' * 400}/ 1] x - [ {'9' * 400} ], type = f32,",
        ),
    ]
)


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.lists(WORDS, max_size=6).map("".join)), max_size=6))
def test_progress_lines(pieces: list[tuple[str, str]]) -> None:
    imatrix, quantize, divergences = ImatrixOutput(), QuantizeOutput(), DivergenceOutput()
    for stream, text in pieces:
        for output in (imatrix, quantize, divergences):
            output.feed(stream, text)
    assert imatrix.done >= 0
    assert imatrix.ppl is None or np.isfinite(imatrix.ppl) or imatrix.non_finite_at
    assert quantize.elements >= 0
    divergences.divergence(100)
    for _, text in pieces:
        with suppress(ValueError):  # which becomes the caller's EngineError
            assert parse_token_ids(text) >= 0
