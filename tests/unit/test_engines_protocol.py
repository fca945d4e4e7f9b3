"""Every job reaches the worker as the value it was, and finds the one function that does it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import pytest

from imatrix_runner.engines import protocol
from imatrix_runner.engines.audit_jobs import AuditCandidate, AuditJob, AuditTensor
from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingErrorsJob, Trial, TrialsJob
from imatrix_runner.engines.covariance_jobs import CovarianceJob
from imatrix_runner.engines.jobs import (
    CheckJob,
    ChunkRange,
    CollectJob,
    CollectOptions,
    Donor,
    Native,
    PassJob,
    PassLevel,
    QuantizeJob,
    QuantizeOptions,
    TensorTarget,
)
from imatrix_runner.engines.measures import AnswerJob, MeasureJob, ReferenceJob
from imatrix_runner.engines.pass_parts import PassPart, PassWork, WantedPair, WantedPlace
from imatrix_runner.engines.speed_jobs import SpeedJob
from imatrix_runner.engines.task_jobs import TaskJob
from imatrix_runner.engines.worker.__main__ import FUNCTIONS, function_of
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.untrusted import UnreadableError

MODEL, TEXT, OUT, LOG = Path("/m.gguf"), Path("/t.txt"), Path("/out"), Path("/log")
COMPUTE = CollectOptions(n_ctx=128, threads=2, override_tensors=("exps=CPU",), repack=False)
LEVEL = QuantizeJob(
    "level-Q4_0", MODEL, OUT, "Q4_0", QuantizeOptions(pins=("attn_q=q8_0",), tensor_type_file=TEXT), OUT, 2, LOG
)
PAIR = WantedPair("q4_0", 36, (WantedPlace("Q4_0", 0, 96),), "refined")
TARGET = TensorTarget("blk.0.a.weight", "blk.1.a.weight", "q4_0")
PASS = PassJob(
    step="pass",
    sources=(MODEL,),
    levels=(PassLevel("Q4_0", LEVEL, (TARGET,), "print"),),
    donors=(Donor((OUT,), LOG),),
    lineage="lineage",
    imatrix=OUT,
    threads=None,
    buffer_bytes=1 << 20,
    log=LOG,
    native=Native(OUT, LOG),
    part=PassPart("a", ((PassWork("blk.1.a.weight", 64, 128, (PAIR,)),),), 32, ordered=True, scratch=OUT),
)

JOBS: tuple[protocol.Job, ...] = (
    protocol.ProbeJob(OUT, repack=False),
    protocol.CountTokensJob(MODEL, TEXT, parse_special=True),
    protocol.TokeniseJob(MODEL, TEXT, OUT, parse_special=False),
    CollectJob("imatrix", MODEL, TEXT, (ChunkRange(4, 2), ChunkRange(0, 4)), OUT, COMPUTE, "print", LOG),
    CovarianceJob(
        step="covariances",
        model=MODEL,
        text=TEXT,
        ranges=(ChunkRange(4, 2), ChunkRange(0, 4)),
        folder=OUT,
        options=COMPUTE,
        weights=("blk.0.attn_q.weight", "output.weight"),
        fingerprint="print",
        memory_bytes=1 << 30,
        log=LOG,
        native=Native(OUT, LOG),
    ),
    ReferenceJob("refer", MODEL, TEXT, ChunkRange(4, 2), OUT, COMPUTE, "print", None, (LOG, "another")),
    MeasureJob("measure", MODEL, TEXT, OUT, COMPUTE, "print", LOG, first=4, limit=2),
    AnswerJob("answer", MODEL, TEXT, OUT, 128, COMPUTE, "print", LOG),
    TaskJob("tasks", MODEL, TEXT, OUT, COMPUTE, "print", LOG),
    protocol.DryRunsJob((LEVEL, replace(LEVEL, imatrix=None))),
    PASS,
    protocol.PreparePassJob(PASS),
    CheckJob("check", (OUT,), LOG, None, None),
    RoundingErrorsJob(
        step="errors",
        sources=(MODEL, TEXT),
        tensors=(RoundedTensor("a.weight", "q4_0"), RoundedTensor("a.weight", "q4_0", weighted=False)),
        imatrix=OUT,
        out=OUT,
        fingerprint="print",
        threads=2,
        buffer_bytes=1 << 20,
        log=None,
        exclude_weights=("b",),
    ),
    TrialsJob(
        step="trials",
        model=MODEL,
        text=TEXT,
        chunks=(3, 0),
        trials=(Trial("q", (RoundedTensor("a.weight", "q4_0"), RoundedTensor("b.weight", "f16"))),),
        imatrix=None,
        out=OUT,
        options=COMPUTE,
        fingerprint="print",
        log=LOG,
        first_scored=64,
        enough=0.1,
        native=Native(OUT, LOG),
    ),
    AuditJob(
        step="audit",
        sources=(MODEL,),
        files=(OUT,),
        tensors=(AuditTensor("a.weight", (AuditCandidate(-1), AuditCandidate(0, "refined"))),),
        matrices=(TEXT,),
        seed=7,
        sample=None,
        threads=2,
        log=LOG,
        native=Native(OUT, LOG),
    ),
    SpeedJob("speed", MODEL, 512, 128, 64, 2, COMPUTE, LOG),
)


def test_there_is_a_job_of_every_kind_here() -> None:
    assert [type(job) for job in JOBS] == list(get_args(protocol.Job))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_a_job_arrives_as_it_was_sent(job: protocol.Job) -> None:
    assert protocol.decode_job(protocol.encode_job(job).decode()) == job


def test_paths_arrive_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker runs in another directory."""
    monkeypatch.chdir(tmp_path)
    sent = protocol.CountTokensJob(Path("m.gguf"), Path("..") / "t.txt", parse_special=False)
    expected = protocol.CountTokensJob(tmp_path / "m.gguf", tmp_path / ".." / "t.txt", parse_special=False)
    assert protocol.decode_job(protocol.encode_job(sent).decode()) == expected


def test_a_path_that_is_not_utf_8_is_refused_in_words() -> None:
    job = protocol.CountTokensJob(Path(os.fsdecode(b"/caf\xe9.gguf")), TEXT, parse_special=False)
    with pytest.raises(InvalidDataError, match="is not UTF-8"):
        protocol.encode_job(job)


@pytest.mark.parametrize("text", ['{"job": "QuantizeJob", "fields": {}}', '{"job": "CheckJob", "fields": {}}', "{}", "x"])
def test_what_is_no_job_is_refused(text: str) -> None:
    with pytest.raises(UnreadableError):
        protocol.decode_job(text)


def test_the_worker_has_one_function_for_every_job() -> None:
    assert set(FUNCTIONS) == set(get_args(protocol.Job))
    assert len(set(FUNCTIONS.values())) == len(FUNCTIONS)
    for kind in FUNCTIONS:
        assert get_type_hints(function_of(kind)) == {"job": kind, "send": protocol.Send, "return": NoneType}
