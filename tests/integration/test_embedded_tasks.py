"""The embedded engine's requests of tasks: likelihoods and texts as llama.cpp gives them for one sequence, whatever shares a
batch, wherever the job is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE, find, worker_command
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.task_outcomes import read_outcomes
from imatrix_runner.engines.task_jobs import TaskJob, TaskOutcome, TaskRequest
from imatrix_runner.events import ignore
from imatrix_runner.process import Runner, child_environment
from imatrix_runner.toolchain.store import cache_dir
from support.answers import OPTIONS, pieces_of_text


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return EmbeddedEngine(find(os.environ, cache_dir()), Runner())


@pytest.fixture(scope="module")
def requests() -> list[TaskRequest]:
    texts = [prompt.text for prompt in pieces_of_text(24)]
    pairs = [TaskRequest("loglikelihood", text[: len(text) // 2], text[len(text) // 2 :]) for text in texts[:12]]
    choices = [TaskRequest("loglikelihood", texts[0] + "\nAnswer:", f" {letter}") for letter in "ABCD"]
    rolling = [TaskRequest("rolling", text) for text in (texts[12], " ".join(texts[12:20]))]
    written = [TaskRequest("generate", text, until=("\n", "."), n_predict=20 + number % 2) for number, text in enumerate(texts)]
    return [*pairs, *choices, TaskRequest("loglikelihood", "", "The"), *rolling, *written]


def job(folder: Path, model: Path, requests: Sequence[TaskRequest]) -> TaskJob:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "requests.jsonl"
    file.write_bytes(b"".join(msgspec.json.encode(request) + b"\n" for request in requests))
    return TaskJob("tasks", model, file, folder / "out.outcomes", OPTIONS, "these", None)


def computed(engine: EmbeddedEngine, asked: TaskJob) -> dict[int, TaskOutcome]:
    engine.answer_tasks(asked, ignore)
    return read_outcomes(asked.out, asked.fingerprint)


ONE_BY_ONE = """
import json, sys
import numpy as np
from llama_cpp import Llama
asked = json.load(sys.stdin)
llama = Llama(model_path=asked["model"], n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
told = []
for context, continuation in asked["pairs"]:
    bare = context.rstrip()
    context, continuation = bare, context[len(bare):] + continuation
    whole = llama.tokenize((context + continuation).encode(), add_bos=True, special=True)
    start = len(llama.tokenize(context.encode(), add_bos=True, special=True))
    llama.reset()
    llama.eval(whole)
    rows = np.array(llama.scores[start - 1 : len(whole) - 1], np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    told.append(float(sum(row[token] for row, token in zip(rows, whole[start:]))))
print(json.dumps(told))
"""


def test_likelihoods_are_those_of_one_sequence_alone(
    engine: EmbeddedEngine, demo_model: Path, requests: list[TaskRequest], tmp_path: Path
) -> None:
    outcomes = computed(engine, job(tmp_path, demo_model, requests))
    assert sorted(outcomes) == list(range(len(requests)))
    pairs = [(each.context, each.continuation) for each in requests if each.kind == "loglikelihood" and each.context]
    library = engine.bindings.library
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE],
        input=json.dumps({"model": str(demo_model), "pairs": pairs}),
        env=child_environment({LIBRARY_VARIABLE: str(library)} if library is not None else {}),
        text=True,
        capture_output=True,
        check=True,
    )
    alone = json.loads(done.stdout)
    assert [outcomes[number].value for number in range(len(pairs))] == pytest.approx(alone, rel=2e-3, abs=2e-3)
    written = [outcomes[number] for number, each in enumerate(requests) if each.kind == "generate"]
    assert all("\n" not in each.text and "." not in each.text for each in written)
    assert all(each.ended or each.n_tokens >= 20 for each in written)
    assert any(each.ended for each in written)


def test_requests_that_share_no_batch_give_nearly_the_same_and_a_killed_job_exactly_the_same(
    engine: EmbeddedEngine, demo_model: Path, requests: list[TaskRequest], tmp_path: Path
) -> None:
    whole = computed(engine, job(tmp_path / "whole", demo_model, requests))
    some = computed(engine, job(tmp_path / "some", demo_model, requests[:7]))
    assert [some[number].value for number in some] == pytest.approx([whole[number].value for number in some], rel=2e-3)

    asked, kills = job(tmp_path / "killed", demo_model, requests), 0
    for _ in range(60):
        before = asked.out.stat().st_size if asked.out.exists() else 0
        command = worker_command(asked, engine.bindings.library)
        worker = subprocess.Popen(
            command.argv,
            env=child_environment(command.env),
            cwd=command.cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while worker.poll() is None and (not asked.out.exists() or asked.out.stat().st_size <= max(before, 32)):
            time.sleep(0.001)
        over = worker.poll() == 0
        worker.kill()
        worker.communicate()
        if over:
            break
        kills += 1
    assert kills >= 3
    assert computed(engine, asked) == whole
    assert asked.out.read_bytes() == (tmp_path / "whole" / "out.outcomes").read_bytes()


def test_what_is_too_long_is_cut_on_the_left_and_counted(engine: EmbeddedEngine, demo_model: Path, tmp_path: Path) -> None:
    text = " ".join(prompt.text for prompt in pieces_of_text(120))
    asked = [
        TaskRequest("loglikelihood", text, " end"),
        TaskRequest("generate", text, n_predict=8),
        TaskRequest("rolling", text),
    ]
    asked += [replace(asked[1], context="")]
    outcomes = computed(engine, job(tmp_path, demo_model, asked))
    assert outcomes[0].dropped > 0
    assert outcomes[1].dropped > outcomes[0].dropped
    assert (outcomes[2].dropped, outcomes[2].parts > 1) == (0, True)
    assert outcomes[3].n_tokens > 0
