"""What we ship is found, and its absence is told."""

from __future__ import annotations

import pytest

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.resources import CALIBRATION_TEXT, DEMO_MODEL, resource


def test_the_calibration_text_is_there_and_long_enough() -> None:
    text = resource(CALIBRATION_TEXT).read_text(encoding="utf-8")
    assert len(text.encode()) >= 60_000


def test_the_demo_model_is_a_small_full_precision_model() -> None:
    header = read_header(resource(DEMO_MODEL))
    assert header.file_size <= 6_000_000
    assert header.text("general.architecture") == "llama"
    assert (header.integer("llama.embedding_length") or 1) % 256 == 0
    assert {tensor.type_name for tensor in header.tensors} <= {"BF16", "F16", "F32"}


def test_a_missing_file_names_the_places_and_the_remedy() -> None:
    with pytest.raises(InvalidDataError, match=r"nothing\.bin is missing") as caught:
        resource("nothing.bin")
    assert "_resources" in caught.value.why
    assert "pip install" in caught.value.todo
