"""What the journal keeps of steps is written as it always was, and read with its types."""

from __future__ import annotations

import json
from typing import Any

import pytest

from imatrix_runner.context.open_model import ConvertedFacts
from imatrix_runner.engines.jobs import Fallback
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.measurements import Alone
from imatrix_runner.imatrix.collection_facts import CalibrationFacts, CollectedFacts, ImatrixInputs, SourceShare
from imatrix_runner.imatrix.convergence import Point
from imatrix_runner.journal import StepRecord
from imatrix_runner.quantize.level_facts import LevelFacts, LevelInputs, MadeFacts, facts_of_level, ftype_of

LEVEL = LevelFacts(1000, 4.5, False, (Fallback("t", "q4_K", "q5_0"),), 0.25, ("w",), ("u",), ("p",), "sha256:1", False)

# Facts, and what journals say of them.
WRITTEN: list[tuple[Any, dict[str, object]]] = [
    (ConvertedFacts(), {}),
    (ConvertedFacts("MXFP4"), {"dequantised": "MXFP4"}),
    (
        CollectedFacts(
            chunks=16,
            ranges="0-16",
            tokens=9000,
            dataset="a text.txt",
            calibration=CalibrationFacts("/a text.txt", 10, "5ha"),
            ppl=10.5,
            ppl_error=None,
            ppl_chunks=16,
            load_seconds=0.5,
            stopped="chunks",
            curve=(Point(8, 0.5, "t", 0.25),),
        ),
        {
            "chunks": 16,
            "ranges": "0-16",
            "tokens": 9000,
            "dataset": "a text.txt",
            "calibration": {"path": "/a text.txt", "bytes": 10, "sha256": "5ha"},
            "ppl": 10.5,
            "ppl_error": None,
            "ppl_chunks": 16,
            "load_seconds": 0.5,
            "stopped": "chunks",
            "curve": [{"chunks": 8, "worst": 0.5, "tensor": "t", "median": 0.25}],
        },
    ),
    (
        CalibrationFacts("/t", 10, "5ha", "sha256:m", True, None, (SourceShare("s", "5", "mit", 0.5),)),
        {
            "path": "/t",
            "bytes": 10,
            "sha256": "5ha",
            "manifest": "sha256:m",
            "parse_special": True,
            "template": None,
            "sources": [{"name": "s", "sha256": "5", "licence": "mit", "share": 0.5}],
        },
    ),
    (
        MadeFacts(LEVEL, 0.5),
        {
            "level": {
                "n_bytes": 1000,
                "bits_per_weight": 4.5,
                "needs_imatrix": False,
                "fallbacks": [{"tensor": "t", "wanted": "q4_K", "got": "q5_0"}],
                "fallback_share": 0.25,
                "weightless": ["w"],
                "unseen": ["u"],
                "pinned": ["p"],
                "recipe": "sha256:1",
                "is_source": False,
            },
            "share": 0.5,
            "without_weights": [],
        },
    ),
    (Alone("why"), {"why": "why"}),
]


@pytest.mark.parametrize(("facts", "written"), WRITTEN)
def test_facts_are_written_as_in_old_journals_and_come_back(facts: Any, written: dict[str, object]) -> None:
    record = StepRecord.now({}, [], "", 1.0, facts=facts)
    assert json.dumps(record.facts) == json.dumps(written)
    assert record.facts_as(type(facts)) == facts


def test_facts_of_before_some_were_kept_are_read_and_later_ones_passed_over() -> None:
    old = StepRecord.now({}, [], "", 1.0, facts={"dataset": "t", "of a later program": [1]})
    assert old.facts_as(CollectedFacts) == CollectedFacts(dataset="t")
    figures = {
        "n_bytes": 1,
        "bits_per_weight": None,
        "needs_imatrix": True,
        "fallbacks": [],
        "fallback_share": 0,
        "weightless": [],
    }
    assert facts_of_level(StepRecord.now({}, [], "", 1.0, facts={"level": figures})).recipe == ""


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        (CollectedFacts, {}),
        (CollectedFacts, {"dataset": 7}),
        (CollectedFacts, {"dataset": "t", "calibration": "/a text.txt"}),
        (CollectedFacts, {"dataset": "t", "curve": [{"chunks": "many"}]}),
        (MadeFacts, {"level": None}),
        (MadeFacts, {"level": {}, "share": "half"}),
        (Alone, {"why": ["because"]}),
    ],
)
def test_facts_that_nobody_wrote_are_an_error_of_ours(kind: type[Any], facts: dict[str, object]) -> None:
    with pytest.raises(InvalidDataError, match="The journal cannot be read"):
        StepRecord.now({}, [], "", 1.0, facts=facts).facts_as(kind)


def test_inputs_have_the_names_of_old_journals() -> None:
    named = {"model file": "m", "imatrix": "none", "options": "Q8_0", "engine": "e"}
    assert LevelInputs(model_file="m", imatrix="none", options="Q8_0", engine="e").named() == named
    assert StepRecord.now({**named, "later": "x"}, [], "", 1.0).inputs_as(LevelInputs).model_file == "m"
    collected = {
        "model file": "m",
        "calibration text": "t",
        "calibration manifest": "b",
        "context": "512",
        "chunks": "all from 0",
        "options": "-b 1",
        "engine": "e",
    }
    inputs = StepRecord.now(collected, [], "", 1.0).inputs_as(ImatrixInputs)
    assert [*inputs.named().items()] == [*collected.items()]
    del collected["calibration manifest"]
    assert StepRecord.now(collected, [], "", 1.0).inputs_as(ImatrixInputs).named() == collected


def test_the_ftype_of_a_level_is_a_fact_and_was_the_first_word_of_its_options() -> None:
    inputs = LevelInputs(model_file="m", imatrix="none", options="Q4_K_M --pure", engine="e").named()
    assert ftype_of(StepRecord.now(inputs, [], "", 1.0, facts=MadeFacts(LEVEL))) == "Q4_K_M"
    assert ftype_of(StepRecord.now(inputs, [], "", 1.0, facts=MadeFacts(LEVEL, ftype="Q4_K_S"))) == "Q4_K_S"


def test_an_input_that_is_missing_is_named() -> None:
    with pytest.raises(InvalidDataError, match="The journal cannot be read") as caught:
        StepRecord.now({"model file": "m"}, [], "", 1.0).inputs_as(LevelInputs)
    assert "imatrix" in caught.value.why
