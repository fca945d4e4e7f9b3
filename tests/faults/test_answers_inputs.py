"""Prompts that are broken, hostile or too long, models that cannot answer them, and workers that are killed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.completions import read_completions
from imatrix_runner.engines.measures import Prompt
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate import prompts as reading
from imatrix_runner.evaluate.prompts import read_prompts
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.store import cache_dir
from support.answers import ask, groups_in, job, pieces_of_text, started_worker
from support.children import eventually
from support.llama_tools import BareTools
from support.tiny_architectures import write_architecture


def refused(path: Path, data: bytes) -> InvalidDataError:
    path.write_bytes(data)
    with pytest.raises(InvalidDataError) as caught:
        read_prompts(path)
    assert caught.value.todo
    return caught.value


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "it is cut short"),
        (b"12", "it is int, not object"),
        (b"null", "it is null, not object"),
        (b'["Why?"]', "it is array, not object"),
        (b'""', "asks nothing"),
        (b'" \\n"', "asks nothing"),
        (b"{}", "it is empty"),
        (b'{"promt": "Why?"}', "it has: promt"),
        (b'{"prompt": ""}', "`prompt` is empty"),
        (b'{"prompt": 7}', "neither a text nor messages"),
        (b'{"prompt": []}', "empty conversation"),
        (b'{"messages": []}', "empty conversation"),
        (b'{"messages": [{"role": "assistant", "content": "Because."}]}', "asks nothing"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "asks nothing"),
        (b'{"messages": [{"role": "user"}]}', "has no content"),
        (b'{"messages": [{"content": "Why?"}]}', "has no role"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "that is not text"),
        (b'{"text": "a\\u0000b"}', "NUL"),
        (b'{"prompt": "a\\ud800b"}', "half of a surrogate pair"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "it is array, not object"),
        (b'{"prompt": ' + b'{"a":' * 100_000, "nested more than 100 levels deep"),
        (b'{"prompt": "' + b"x" * (17 << 20) + b'"}', "longer than 16 MiB"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: bytes, why: str, tmp_path: Path) -> None:
    error = refused(tmp_path / "prompts.jsonl", b'"Why?"\n\n' + line + b"\n")
    assert error.what == "prompts.jsonl, line 3 cannot be used as a prompt"
    assert why in error.why
    assert "--field" not in error.todo


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("prompts.jsonl", b"", "empty"),
        ("prompts.jsonl", b"\n \n", "empty"),
        ("prompts.txt", b"\n \n", "nothing is written in it"),
        ("prompts.json", b"[]", "empty"),
        ("prompts.txt", b"\x00\x01\x02", "binary"),
        ("prompts.txt", "Why?".encode("utf-16"), "UTF-16"),
        ("prompts.jsonl.gz", gzip.compress(b'"Why?"\n' * 1000, mtime=0)[:30], "damaged"),
        ("prompts.txt", b'{"prompt": "Why?"}\n', "JSON lines"),
        ("prompts.pdf", b"%PDF-1.7", "PDF"),
    ],
)
def test_a_file_without_prompts_is_refused(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    error = refused(tmp_path / name, data)
    assert error.what.startswith(name)
    assert why in error.why


def test_broken_lines_of_a_text_are_named(tmp_path: Path) -> None:
    for data, why in ((b"Why?\n\xff\xfe?\n", "not valid UTF-8"), (b"x" * 600 + b"\na\0b\n", "NUL")):
        error = refused(tmp_path / "prompts.txt", data)
        assert error.what == "prompts.txt, line 2 cannot be used as a prompt"
        assert why in error.why


def test_a_broken_list_is_named_by_its_item(tmp_path: Path) -> None:
    assert "prompts.json, item 2" in refused(tmp_path / "prompts.json", b'["Why?", 7]').what
    assert "after item 1" in refused(tmp_path / "prompts.json", b'["Why?", "And').what


def test_more_prompts_than_anybody_reads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_PROMPTS", 100)
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'"Why?"\n' * 100)
    assert len(read_prompts(path)) == 100
    assert "more than 100 prompts" in refused(path, b'"Why?"\n' * 101).why


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_early(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x" * (8 << 20)}).encode() + b"\n"
    error = refused(tmp_path / "prompts.jsonl.gz", gzip.compress(line, 1) * 500)
    assert error.why == "it holds more than 64.00 MiB"


def test_what_a_file_is_called_cannot_command_a_terminal(tmp_path: Path) -> None:
    error = refused(tmp_path / "a\x1b[2J.jsonl", b"{")
    assert "\x1b" not in str(error)


# -- models ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return EmbeddedEngine(find(os.environ, cache_dir()), Runner())


def refusal(engine: EmbeddedEngine, folder: Path, model: Path, *texts: str, n_predict: int = 40) -> InvalidDataError:
    asked = job(folder, model, [Prompt(text, parse_special=False) for text in texts], n_predict=n_predict)
    with pytest.raises(InvalidDataError) as caught:
        engine.answer(asked, lambda _event: None)
    assert read_completions(asked.out, asked.fingerprint) == []
    return caught.value


def test_a_prompt_too_long_is_refused_before_anything_is_computed(
    engine: EmbeddedEngine, demo_model: Path, tmp_path: Path
) -> None:
    error = refusal(engine, tmp_path, demo_model, "Why?", "a " * 700)
    assert error.what == "Prompt 2 is too long for demo-model.gguf"
    assert "it has 70" in error.why
    assert "trained with a context of 512" in error.why


def test_the_longest_prompt_that_fits_is_answered(engine: EmbeddedEngine, demo_model: Path, tmp_path: Path) -> None:
    """Its last token stands at the context's last place."""
    asked = [Prompt("x " * 60, parse_special=False)]
    [tokens] = {each.n_prompt for each in ask(engine, job(tmp_path / "count", demo_model, asked, n_predict=1))}
    [answer] = ask(engine, job(tmp_path / "fits", demo_model, asked, n_predict=512 - tokens))
    assert answer.ended or len(answer.ids) == 512 - tokens
    assert "too long" in refusal(engine, tmp_path / "over", demo_model, asked[0].text, n_predict=513 - tokens).what


def test_a_model_that_computes_no_numbers_is_named(engine: EmbeddedEngine, demo_model: Path, tmp_path: Path) -> None:
    """NaN in the last norm: it loads."""
    header = read_header(demo_model)
    norm = next(tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    data = bytearray(demo_model.read_bytes())
    at = header.data_offset + norm.offset
    data[at : at + 4] = np.array([np.nan], "<f4").tobytes()
    broken = tmp_path / "demo-model-Q4_K_M.gguf"
    broken.write_bytes(data)
    error = refusal(engine, tmp_path, broken, "Why?")
    assert error.what == "demo-model-Q4_K_M.gguf produced NaN or infinite numbers"
    assert "prompt 1" in error.why


def test_an_encoder_is_refused(engine: EmbeddedEngine, tmp_path: Path) -> None:
    model = write_architecture("bert", tmp_path / "encoder.gguf")
    error = refusal(engine, tmp_path, model, "Why?")
    assert error.what == "encoder.gguf predicts no next token"
    assert "--imatrix none" in error.todo


# -- killed ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_between_groups_it_ends_with_the_same_bytes(
    engine: EmbeddedEngine, tools: BareTools, demo_model: Path, tmp_path: Path
) -> None:
    level, prompts = tools.quantize(demo_model, tmp_path / "Q4_K_M.gguf", "Q4_K_M"), pieces_of_text(60)
    whole = job(tmp_path / "whole", level, prompts)
    ask(engine, whole)
    killed = job(tmp_path / "killed", level, prompts)
    kept: list[int] = []
    for least in (1, 2):
        worker = started_worker(engine, killed)
        assert eventually(lambda least=least: groups_in(killed.out) >= least, seconds=60)  # type: ignore[misc]
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        kept.append(groups_in(killed.out))
    assert kept[0] >= 1
    assert kept[-1] < groups_in(whole.out)
    ask(engine, killed)
    assert killed.out.read_bytes() == whole.out.read_bytes()
