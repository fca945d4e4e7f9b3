"""``calibration build --self``: a text of the model's own answers, the same bytes again, also after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from imatrix_runner.documents.conversations import content_of
from imatrix_runner.documents.documents import Conversation
from imatrix_runner.documents.manifest import find_manifest
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.measures import Prompt
from imatrix_runner.evaluate.prompts import read_prompts
from imatrix_runner.files import sha256
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Runner
from imatrix_runner.resources import SELF_PROMPTS, resource
from imatrix_runner.toolchain.store import cache_dir
from support.answers import ask, job, set_number
from support.command_line import RunCommand, started
from support.in_process import CommandLine
from support.tiny_models import write_llama_gguf

SHORT = ("--predict", "8", "-t", "1", "--near-duplicates", "0", "--min-chars", "1")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    asked = ["the cat sat on", {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a dog"}]}]
    file.write_text("".join(json.dumps(each if isinstance(each, dict) else {"prompt": each}) + "\n" for each in asked))
    return file


def test_the_same_seed_gives_the_same_text(chat_model: Path, prompts: Path, tmp_path: Path, cli: CommandLine) -> None:
    def build(name: str, *further: str) -> Path:
        out = tmp_path / name
        ran = cli("calibration", "build", "--self", prompts, "--model", chat_model, "-o", out, *SHORT, *further)
        assert ran.code == 0, ran.err
        return out

    one, again, other = build("one.txt"), build("again.txt"), build("other.txt", "--seed", "2")
    assert one.read_bytes() == again.read_bytes() != other.read_bytes()
    manifest = find_manifest(one)
    assert manifest is not None
    assert manifest.parse_special
    assert manifest.self_made is not None
    assert manifest.self_made.prompts == f"sha256:{sha256(prompts)}"
    assert manifest.self_made.model == f"sha256:{sha256(chat_model)}"
    assert (manifest.self_made.answers + manifest.self_made.empty, manifest.self_made.seed) == (4, 1)
    assert manifest.fingerprint != find_manifest(other).fingerprint  # type: ignore[union-attr]
    assert "the cat sat on" in one.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("one.txt")} == {"one.txt", "one.txt.manifest.json"}


def test_prompts_of_an_evaluation_are_refused(chat_model: Path, prompts: Path, tmp_path: Path, cli: CommandLine) -> None:
    domain = tmp_path / "domain.jsonl"
    domain.write_text('{"prompt": "The cat  sat on"}\n')
    words = ("calibration", "build", "--self", prompts, "--model", chat_model, "-o", tmp_path / "x.txt", *SHORT)
    ran = cli(*words, "--evaluation", domain)
    assert ran.code == 6
    assert "Prompts for calibration may not be those of an evaluation" in ran.err
    assert "prompts.jsonl, line 1 is a prompt of domain.jsonl, too" in ran.err
    assert not (tmp_path / "x.txt").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "There is nothing to build a text from"),
        (("--self", "shipped"), 2, "--self needs a model"),
        (("--self", "shipped", "--model", "nothing.gguf"), 2, "there is no file nothing.gguf"),
        (("--self", "nothing.jsonl", "--model", "MODEL"), 2, "There is no file nothing.jsonl"),
        (("--self", "shipped", "--model", "PLAIN"), 6, "has no chat template"),
    ],
)
def test_bad_input_in_three_lines(
    words: tuple[str, ...], code: int, said: str, chat_model: Path, tiny_model: Path, tmp_path: Path, cli: CommandLine
) -> None:
    models = {"MODEL": str(chat_model), "PLAIN": str(tiny_model)}
    ran = cli("calibration", "build", "-o", tmp_path / "x.txt", *(models.get(word, word) for word in words))
    assert ran.code == code
    assert said in ran.err
    assert [line[:7] for line in ran.err.splitlines()[-3:]] == ["Error: ", "  Why: ", "  Do:  "]


def test_the_shipped_prompts_are_prompts_of_many_kinds() -> None:
    lines = [json.loads(line) for line in resource(SELF_PROMPTS).read_text(encoding="utf-8").splitlines()]
    records = read_prompts(resource(SELF_PROMPTS))
    assert len(records) == len(lines) == len({json.dumps(line) for line in lines}) >= 290
    assert all(not isinstance(content_of(line, unanswered=True), str) for line in lines)
    assert sum(isinstance(record.content, Conversation) and bool(record.content.tools) for record in records) >= 40


def test_a_killed_build_goes_on_with_the_same_bytes(chat_model: Path, tmp_path: Path, runner: RunCommand) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat sat on {number} mats"}) + "\n" for number in range(40)))
    words = ("calibration", "build", "--self", prompts, "--model", chat_model, *SHORT, "--predict", "64", "-o")
    assert runner(*words, tmp_path / "whole.txt").code == 0
    answers = tmp_path / "killed.txt.answers-1"
    with started(*words, tmp_path / "killed.txt", cwd=tmp_path) as running:
        running.wait_for(lambda: answers.is_file() and answers.stat().st_size > 100)
        assert running.kill_tree()
    before = answers.read_bytes()
    assert not (tmp_path / "killed.txt").exists()
    with started(*words, tmp_path / "killed.txt", cwd=tmp_path) as running:
        running.wait_for(lambda: answers.is_file() and answers.stat().st_size > len(before))
        assert answers.read_bytes().startswith(before[:32])
        assert running.finish().code == 0
    assert (tmp_path / "killed.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


def test_prompts_that_a_matrix_was_made_of_are_not_compared_on(
    chat_model: Path, prompts: Path, tmp_path: Path, cli: CommandLine
) -> None:
    own = tmp_path / "own.txt"
    built = cli("calibration", "build", "--self", prompts, "--model", chat_model, "-o", own, *SHORT, "--predict", "64")
    assert built.code == 0, built.err
    made = cli("run", chat_model, "-f", own, "-c", "16", "-b", "64", "-t", "1", "--levels", "Q8_0", "-q")
    assert made.code == 0, made.err
    ran = cli("evaluate", chat_model, "-c", "64", "-t", "1", "--chunks", "2", "--domain", prompts, "--predict", "4")
    assert ran.code == 6
    assert "prompts.jsonl cannot be compared on" in ran.err
    assert "line 1 is in own.txt" in ran.err


def test_a_model_that_ends_every_answer_at_once_is_refused(tmp_path: Path, cli: CommandLine) -> None:
    bare = {"tokenizer.chat_template": "{{ messages[-1].content }}"}
    model = write_llama_gguf(tmp_path / "bare.gguf", metadata=bare, fluent=True)
    engine = EmbeddedEngine(find(os.environ, cache_dir()), Runner())
    (answer,) = ask(engine, job(tmp_path / "asked", model, [Prompt("the cat sat on", parse_special=True)], n_predict=1))
    eos = read_header(model).integer("tokenizer.ggml.eos_token_id")
    assert eos is not None
    silent = set_number(model, tmp_path / "silent.gguf", "tokenizer.ggml.eos_token_id", eos, answer.ids[0])
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the cat sat on\n")
    words = ("--self", prompt, "--model", silent, "-o", tmp_path / "x.txt", *SHORT, "--sampled", "0")
    ran = cli("calibration", "build", *words)
    assert ran.code == 6
    assert "silent answers nothing" in ran.err
    assert [line[:7] for line in ran.err.splitlines()[-3:]] == ["Error: ", "  Why: ", "  Do:  "]
