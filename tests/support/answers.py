"""Prompts for the embedded engine, and what it left of its answers."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from imatrix_runner.engines.embedded.bindings import worker_command
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.completions import read_completions
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.measures import AnswerJob, Completion, Prompt
from imatrix_runner.events import ignore
from imatrix_runner.process import child_environment
from imatrix_runner.resources import HELD_OUT_TEXT, resource

PREDICT = 40
OPTIONS = CollectOptions(threads=1)


def job(
    folder: Path, model: Path, prompts: Sequence[Prompt], *, n_predict: int = PREDICT, options: CollectOptions = OPTIONS
) -> AnswerJob:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prompts.jsonl"
    file.write_bytes(b"".join(msgspec.json.encode(prompt) + b"\n" for prompt in prompts))
    return AnswerJob("answer", model, file, folder / "out.answers", n_predict, options, "these", None)


def ask(engine: EmbeddedEngine, asked: AnswerJob) -> list[Completion]:
    engine.answer(asked, ignore)
    return read_completions(asked.out, asked.fingerprint)


def set_number(model: Path, copy: Path, key: str, before: int, after: int) -> Path:
    """The same model with another u32 in its metadata."""
    data, start = model.read_bytes(), key.encode() + (4).to_bytes(4, "little")
    assert data.count(start + before.to_bytes(4, "little")) == 1
    copy.write_bytes(data.replace(start + before.to_bytes(4, "little"), start + after.to_bytes(4, "little")))
    return copy


def pieces_of_text(count: int) -> list[Prompt]:
    """Pieces of English and Python in the held-out text, of about 5 to 250 tokens: contexts of 256 and of 512."""
    text, draw = resource(HELD_OUT_TEXT).read_text(encoding="utf-8"), random.Random(1)
    found: list[Prompt] = []
    while len(found) < count:
        begin, length = draw.randrange(len(text) - 600), draw.choice((20, 60, 200, 400, 600))
        if text[begin : begin + length].isascii():
            found.append(Prompt(text[begin : begin + length], parse_special=False))
    return found


def groups_in(path: Path) -> int:
    """Records in a file of answers, by their lengths; the last may be torn."""
    data = path.read_bytes()[32:] if path.exists() else b""
    count = 0
    while len(data) >= 4 and len(data) >= (size := int.from_bytes(data[:4], "little") + 8):
        data, count = data[size:], count + 1
    return count


def started_worker(engine: EmbeddedEngine, asked: AnswerJob) -> subprocess.Popen[bytes]:
    """The engine's child, without the engine."""
    command = worker_command(asked, engine.bindings.library)
    return subprocess.Popen(
        list(command.argv),
        env=child_environment(command.env),
        cwd=command.cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
