"""A source of which only a part is held at first is read again if that part proves too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imatrix_runner.calibration.build import build_text
from imatrix_runner.calibration.build.build_text import Builder, BuildOptions, Near, OpenedSource, Render, Rendered
from imatrix_runner.calibration.build.duplicates import NearDuplicates
from imatrix_runner.calibration.tokenisers import HuggingFaceTokeniser
from imatrix_runner.documents.documents import BadRecord, DocumentRecord
from imatrix_runner.events import ignore
from imatrix_runner.signals import Stop
from support.tiny_models import sample_text, write_hf_directory


def source(texts: list[str], reads: list[int]) -> OpenedSource:
    def records(_on_bytes: Callable[[int], None]) -> Iterator[DocumentRecord | BadRecord]:
        reads.append(len(texts))
        return (DocumentRecord(text, f"line {number}") for number, text in enumerate(texts))

    return OpenedSource("texts", "file", "ours", "", 1, records)


def near() -> Near:
    found = NearDuplicates(0.8)
    return lambda text: found.add(text) is not None


def no_dialogues(*_: object) -> Rendered:
    raise AssertionError("there are none")


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[OpenedSource, int], Builder]:
    """Hold so little at first that it barely covers a budget of 1,000 tokens."""
    monkeypatch.setattr(build_text, "_LEAST_HELD", 1)
    tokeniser = HuggingFaceTokeniser(write_hf_directory(tmp_path / "hf"))
    render: Render = no_dialogues

    def make(opened: OpenedSource, tokens: int) -> Builder:
        options = BuildOptions(tokens=tokens)
        return Builder([opened], options, tokeniser=tokeniser, render=render, near=near, sink=ignore, stop=Stop())

    return make


def test_a_source_of_near_duplicates_is_read_again_for_more(builder: Callable[[OpenedSource, int], Builder]) -> None:
    form = sample_text(900)
    texts = [f"{form} {number}" for number in range(600)]
    texts += [sample_text(400, seed=number) for number in range(1, 120)]
    reads: list[int] = []
    built = builder(source(texts, reads), 1000).build()
    assert len(reads) > 1
    (facts,) = built.manifest.sources
    assert built.manifest.tokens is not None
    assert 1000 <= built.manifest.tokens < 1300
    assert 10 < facts.near_duplicates < 600
    assert facts.records == len(texts)


def test_a_source_with_enough_is_read_once(builder: Callable[[OpenedSource, int], Builder]) -> None:
    reads: list[int] = []
    built = builder(source([sample_text(400, seed=number) for number in range(300)], reads), 2000).build()
    assert len(reads) == 1
    assert built.manifest.tokens is not None
    assert 2000 <= built.manifest.tokens < 2300
