"""The shipped texts have the properties that the documents state."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from pathlib import Path

import pytest
from fontTools import unicodedata as scripts

from imatrix_runner.calibration.build.duplicates import NearDuplicates
from imatrix_runner.calibration.inspect.overlap import overlap
from imatrix_runner.calibration.parts import parse_parts, part_documents, part_records
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.process import Runner
from imatrix_runner.resources import CALIBRATION_TEXT, HELD_OUT_TEXT, resource
from imatrix_runner.toolchain.store import cache_dir

TEXT = resource(CALIBRATION_TEXT).read_text(encoding="utf-8")
HELD_OUT = resource(HELD_OUT_TEXT).read_text(encoding="utf-8")
PARTS = (
    "science-prose",
    "fiction",
    "dialogue-roleplay",
    "question-answer",
    "reasoning-math",
    "code",
    "structured-data",
    "chat-tool-calls",
    "edge-cases",
    "languages",
)


def part(name: str) -> str:
    return next(each.text for each in parse_parts(TEXT) if each.name == name)


def test_both_are_ours_and_in_the_same_parts() -> None:
    assert len(TEXT.encode()) > 240_000
    assert len(HELD_OUT.encode()) > 50_000
    for text in (TEXT, HELD_OUT):
        assert "released under the MIT licence and, at your choice, CC0 1.0" in text.splitlines()[1]
        assert tuple(each.name for each in parse_parts(text)) == PARTS


@pytest.mark.parametrize("text", [TEXT, HELD_OUT], ids=["calibration", "held out"])
def test_no_line_comes_twice(text: str) -> None:
    lines = Counter(line.strip() for line in text.splitlines())
    assert [line for line, count in lines.items() if count > 1 and len(line) >= 12] == []


@pytest.mark.parametrize("text", [TEXT, HELD_OUT], ids=["calibration", "held out"])
def test_no_document_is_nearly_another(text: str) -> None:
    near = NearDuplicates(0.5)
    documents = [document for each in parse_parts(text) for document, _ in part_documents(each.text)]
    assert len(documents) > 30
    assert [document[:60] for document in documents if near.add(document) is not None] == []


def test_it_compresses_no_better_than_ordinary_prose() -> None:
    """English prose of this length: 2.3 to 2.7 (zlib, level 9); generated or repetitive text: 4 and more."""
    data = TEXT.encode()
    assert len(data) / len(zlib.compress(data, 9)) < 2.3


def test_the_code_is_in_many_languages() -> None:
    tags = set(re.findall(r"^```([a-z+#]+)$", part("code"), re.MULTILINE | re.IGNORECASE))
    assert len(tags) >= 20
    assert {"python", "c", "cpp", "rust", "go", "java", "javascript", "typescript", "sql", "bash"} <= tags


def test_there_are_many_natural_languages_in_many_scripts() -> None:
    text = part("languages")
    names = set(re.findall(r"^([^\s.。]{2,20}(?: [^\s.。]{2,12})?)[.。]", text, re.MULTILINE))
    assert len(names) >= 25
    letters = Counter(scripts.script(character) for character in text if character.isalpha())
    assert len([script for script, count in letters.items() if count >= 100 and script not in ("Zyyy", "Zinh")]) >= 12


def test_the_held_out_text_shares_nothing_with_the_calibration_text() -> None:
    text, held_out = ("\n\n".join(each.text for each in parse_parts(both)) for both in (TEXT, HELD_OUT))
    found = overlap(text, held_out)
    assert found.n_shingles > 5000
    assert found.share == 0


@pytest.mark.parametrize("vocabulary", ["llama-bpe", "qwen2", "gemma-4"])
def test_it_is_more_than_a_hundred_chunks_and_names_no_control_token(vocabulary: str, llama_models: Path) -> None:
    engine = EmbeddedEngine(find(os.environ, cache_dir()), Runner())
    model = llama_models / f"ggml-vocab-{vocabulary}.gguf"
    text = resource(CALIBRATION_TEXT)
    n_tokens = engine.count_tokens(model, text, parse_special=False, log=None)
    assert n_tokens // 512 >= 128
    assert engine.count_tokens(model, text, parse_special=True, log=None) == n_tokens


def test_every_part_gives_documents() -> None:
    for name in PARTS:
        records = list(part_records(name))
        assert len(records) >= 4
        assert all(isinstance(record.content, str) and record.content.strip() for record in records)
