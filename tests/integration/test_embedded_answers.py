"""The embedded engine's greedy answers: the most likely tokens, whatever stands beside a prompt, wherever it is stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE, find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.completions import read_completions
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.measures import Prompt
from imatrix_runner.errors import InterruptedRunError
from imatrix_runner.events import Event, Progress
from imatrix_runner.process import Runner, child_environment
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.store import cache_dir
from support.answers import OPTIONS, PREDICT, ask, job, pieces_of_text, set_number
from support.llama_tools import BareTools
from support.tiny_models import write_llama_gguf


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return EmbeddedEngine(find(os.environ, cache_dir()), Runner())


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> CollectOptions:
    """More than a busy machine has processors for: they must not wait for each other in a loop."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return replace(OPTIONS, threads=3)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return pieces_of_text(40)


@pytest.fixture(scope="module")
def level(tools: BareTools, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.quantize(demo_model, tmp_path_factory.mktemp("level") / "Q4_K_M.gguf", "Q4_K_M")


ONE_BY_ONE = """
import json, sys
from llama_cpp import Llama
asked = json.load(sys.stdin)
common = dict(model_path=asked["model"], n_ctx=512, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
llama, every = Llama(**common), Llama(**common, logits_all=True)
told = []
for text, ids in zip(asked["texts"], asked["ids"]):
    prompt = llama.tokenize(text.encode(), add_bos=True, special=False)
    llama.reset()
    mine = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token == llama.token_eos() or len(mine) == asked["n_predict"]:
            break
        mine.append(token)
    every.reset()
    every.eval(prompt + ids)
    rows = every.scores[len(prompt) - 1 : len(prompt) - 1 + len(ids)]
    told.append((len(prompt), mine, [float(row.max() - row[token]) for row, token in zip(rows, ids)]))
print(json.dumps(told))
"""
"""llama-cpp-python's own loop, one prompt alone; and how far behind the most likely token each of ``ids`` is when all are
computed in one batch."""


def test_answers_are_what_one_sequence_alone_gives(
    engine: EmbeddedEngine, demo_model: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    """llama.cpp computes a single row in another order than several, so where two tokens are next to equally likely (on the
    demo model within a few hundredths) its one-sequence loop may take the other; every token of ours is among the likeliest."""
    asked = prompts[:16]
    ours = ask(engine, job(tmp_path, demo_model, asked))
    question = {"model": str(demo_model), "n_predict": PREDICT, "texts": [prompt.text for prompt in asked]}
    question["ids"] = [completion.ids for completion in ours]
    library = engine.bindings.library
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE],
        input=json.dumps(question),
        env=child_environment({LIBRARY_VARIABLE: str(library)} if library is not None else {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert [completion.n_prompt for completion in ours] == [n_prompt for n_prompt, _, _ in told]
    gaps = [gap for _, _, row in told for gap in row]
    assert max(gaps) < 0.1
    assert sum(gap > 0 for gap in gaps) < 0.01 * len(gaps)
    same = 0
    for completion, (_, theirs, row) in zip(ours, told, strict=True):
        parted = next((at for at, (a, b) in enumerate(zip(completion.ids, theirs, strict=False)) if a != b), None)
        assert parted is not None or len(completion.ids) == len(theirs) or completion.ended
        assert parted is None or row[parted] < 0.1
        same += parted is None
    assert same > len(ours) / 2


@pytest.mark.parametrize("kind", ["source", "level", "experts"])
def test_no_answer_depends_on_those_beside_it_nor_on_threads(
    kind: str,
    engine: EmbeddedEngine,
    demo_model: Path,
    level: Path,
    prompts: list[Prompt],
    many_threads: CollectOptions,
    tmp_path: Path,
) -> None:
    if kind == "experts":
        model = write_llama_gguf(tmp_path / "experts.gguf", experts=4)
    else:
        model = {"source": demo_model, "level": level}[kind]
    together = ask(engine, job(tmp_path / "together", model, prompts))
    backwards = ask(engine, job(tmp_path / "backwards", model, prompts[::-1]))
    assert [each.ids for each in backwards[::-1]] == [each.ids for each in together]
    for number in (7, 39):
        asked = job(tmp_path / f"alone-{number}", model, [prompts[number]], n_predict=12, options=many_threads)
        [alone] = ask(engine, asked)
        assert alone.ids == together[number].ids[:12]


def test_long_prompts_do_not_depend_on_threads_either(
    engine: EmbeddedEngine, demo_model: Path, many_threads: CollectOptions, tmp_path: Path
) -> None:
    """Of a single sequence beyond 512 tokens ggml cuts a token's attention into a piece per thread: there are always two."""
    model = set_number(demo_model, tmp_path / "model.gguf", "llama.context_length", 512, 8192)
    text = resource(HELD_OUT_TEXT).read_text(encoding="utf-8")
    asked = [Prompt(text[:9000], parse_special=False)]
    found = [
        ask(engine, job(tmp_path / str(options.threads), model, asked, n_predict=100, options=options))
        for options in (OPTIONS, many_threads)
    ]
    assert found[0] == found[1]
    assert found[0][0].n_prompt + 100 > 4096


def test_an_answer_ends_with_a_token_that_ends_generations(engine: EmbeddedEngine, demo_model: Path, tmp_path: Path) -> None:
    """A vocabulary in which what the model says third is such a token."""
    asked = [Prompt("Return the", parse_special=False)]
    [usual] = ask(engine, job(tmp_path / "usual", demo_model, asked))
    assert not usual.ended
    assert len(usual.ids) == PREDICT
    third = next(at for at in range(2, PREDICT) if usual.ids[at] not in usual.ids[:at])
    other = set_number(demo_model, tmp_path / "other.gguf", "tokenizer.ggml.eos_token_id", 0, usual.ids[third])
    [short] = ask(engine, job(tmp_path / "short", other, asked))
    assert short.ended
    assert short.ids == usual.ids[:third]
    assert usual.text.startswith(short.text)


def test_a_template_s_bos_is_not_doubled_and_control_tokens_are_written_out(
    engine: EmbeddedEngine, demo_model: Path, tmp_path: Path
) -> None:
    """<|endoftext|> is the demo model's BOS: its vocabulary adds it, and templates write it."""
    texts = ("Return the", "<|endoftext|>Return the", "Return<|endoftext|>")
    plain, written, inside = ask(engine, job(tmp_path, demo_model, [Prompt(text, parse_special=True) for text in texts]))
    assert (plain.n_prompt, plain.ids) == (written.n_prompt, written.ids)
    letters = ask(engine, job(tmp_path / "letters", demo_model, [Prompt(texts[2], parse_special=False)]))
    assert letters[0].n_prompt > inside.n_prompt
    byte = write_llama_gguf(tmp_path / "bytes.gguf", seed=3)
    [noise] = ask(engine, job(tmp_path / "noise", byte, [Prompt("The", parse_special=False)]))
    assert noise.text.encode().decode() == noise.text
    assert "\ufffd" in noise.text  # a random model writes no UTF-8


# -- stopped ---------------------------------------------------------------------------------------------------------------


def test_progress_counts_prompts(engine: EmbeddedEngine, demo_model: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    events: list[Event] = []
    engine.answer(job(tmp_path, demo_model, prompts), events.append)
    counts = [event.done for event in events if isinstance(event, Progress)]
    assert counts == sorted(set(counts))
    assert counts[-1] == len(prompts)
    assert len(counts) > len(prompts) / 2
    assert {event.total for event in events if isinstance(event, Progress)} == {len(prompts)}


def test_a_stop_ends_after_a_group_and_the_same_job_goes_on(
    demo_model: Path, prompts: list[Prompt], tmp_path: Path, engine: EmbeddedEngine
) -> None:
    whole = job(tmp_path / "whole", demo_model, prompts)
    ask(engine, whole)
    stop = Stop()
    stoppable = EmbeddedEngine(engine.bindings, Runner(stop))
    stopped = job(tmp_path / "stopped", demo_model, prompts)

    def hear(event: Event) -> None:
        if isinstance(event, Progress):
            stop.request()

    with pytest.raises(InterruptedRunError):
        stoppable.answer(stopped, hear)
    kept = read_completions(stopped.out, stopped.fingerprint)
    assert 0 < len(kept) < len(prompts)
    ask(engine, stopped)
    assert stopped.out.read_bytes() == whole.out.read_bytes()
