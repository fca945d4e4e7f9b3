"""Ids of steps are what journals have always had, and come apart again."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from imatrix_runner.journal import FactName, Journal, StepRecord, WorkspaceFacts
from imatrix_runner.steps import WITHOUT_IMATRIX, Kind, imatrix_in, imatrix_input, name_in, step_id

IDS: list[tuple[Kind, str, str]] = [
    ("convert", "bf16", "convert bf16"),
    ("imatrix", "", "imatrix"),
    ("imatrix", "/home/ada/my matrix.gguf", "imatrix /home/ada/my matrix.gguf"),
    ("range", "000000-000012", "imatrix-000000-000012"),
    ("snapshot", "/w/imatrix.gguf.at_64", "snapshot /w/imatrix.gguf.at_64"),
    ("costs", "", "costs"),
    ("mix", "MIX@4.25bpw", "mix MIX@4.25bpw"),
    ("covariances", "", "covariances"),
    ("rounding", "FEEDBACK-Q4_K_M", "rounding FEEDBACK-Q4_K_M"),
    ("level", "Q4_K_M", "level-Q4_K_M"),
    ("reference", "0-64", "reference 0-64"),
    ("evaluate", "Q4_K_M without imatrix", "evaluate Q4_K_M without imatrix"),
    ("compare", "Q4_K_M", "compare Q4_K_M"),
    ("alone", "Q4_K_M", "alone Q4_K_M"),
    ("against", "MIX-4.25bpw-IQ4_XS", "against MIX-4.25bpw-IQ4_XS"),
    ("other", "m-Q4_K_M of them", "other m-Q4_K_M of them"),
    ("answer", "Q4_K_M", "answer Q4_K_M"),
    ("speed", "Q4_K_M", "speed Q4_K_M"),
    ("tasks", "Q4_K_M", "tasks Q4_K_M"),
    ("modelfile", "Q4_K_M", "modelfile Q4_K_M"),
    ("report", "", "report"),
]


def test_every_kind_is_here() -> None:
    assert {kind for kind, _, _ in IDS} == {*get_args(Kind)}


@pytest.mark.parametrize(("kind", "name", "step"), IDS)
def test_an_id_is_as_in_old_journals_and_names_one_kind(kind: Kind, name: str, step: str) -> None:
    assert step_id(kind, name) == step
    assert {other: name_in(step, other) for other in get_args(Kind) if name_in(step, other) is not None} == {kind: name}


@pytest.mark.parametrize("step", ["", "level", "levels", "evaluate", "convert", "imatrixes", "reports", "foreign step"])
def test_what_is_no_id_is_of_no_kind(step: str) -> None:
    assert [name_in(step, kind) for kind in get_args(Kind)] == [None] * len(get_args(Kind))


def test_a_journal_finds_steps_by_kind(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.json")
    for step in ("level-B", "imatrix", "foreign", "level-A", "evaluate A", "imatrix /x"):
        journal.record(step, StepRecord.now({}, [], step, 1.0))
    assert {name: record.reason for name, record in journal.of_kind("level").items()} == {"B": "level-B", "A": "level-A"}
    assert [*journal.of_kind("level")] == ["B", "A"]
    assert [*journal.of_kind("imatrix")] == ["", "/x"]
    assert not journal.of_kind("report")


def test_the_names_that_can_be_asked_for_are_those_that_can_be_remembered() -> None:
    assert {*get_args(FactName)} == {*WorkspaceFacts.__annotations__}


@pytest.mark.parametrize("name", ["imatrix.gguf", "my sha256:1 matrix.dat", ""])
def test_an_imatrix_is_named_by_file_and_content(name: str) -> None:
    assert imatrix_input("imatrix.gguf", "0f") == "imatrix.gguf sha256:0f"
    assert imatrix_in(imatrix_input(name, "0f")) == (name, "0f")


@pytest.mark.parametrize("text", ["", WITHOUT_IMATRIX, "imatrix.gguf", "sha256:0f"])
def test_another_text_names_no_imatrix(text: str) -> None:
    assert imatrix_in(text) == ("", "")
