"""The hub's own parsers, from npm, read our names as our copy of their rules does, and the headers of files made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.hub.label_rules import FILE_TYPES, LARGE, hub_label
from imatrix_runner.publish.file_names import PublishedFile, checked_names
from support.command_line import run_command
from support.node_parsers import ask_hub_parsers
from support.published_names import LABELS, MADE, NUMBERS

pytestmark = pytest.mark.node

LEVELS = ("Q4_K_L", "IQ2_XXS", "MXFP4_MOE")
WORDS = ("{0}", "{0}_L", "FEEDBACK-{0}", "MIX-4.25bpw-{0}", "REFINED-MIX-4.2512bpw-2-{0}", "FEEDBACK-{0}_L")


def _published() -> list[str]:
    """Paths of every level that can be made, and of mixes and roundings of it, split and whole."""
    levels = [(words.format(label), label) for label in MADE for words in WORDS]
    files = [PublishedFile("x", level, "Model", NUMBERS[label], n) for level, label in levels for n in (0, 2)]
    return [path for each in files for path in checked_names([each])[0].paths]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Levels, and the importance matrix that they were made with."""
    folder = tmp_path_factory.mktemp("made")
    command = ("run", tiny_model, "--imatrix", tiny_imatrix, "--levels", ",".join(LEVELS), "--engine", "embedded")
    done = run_command(*command, cwd=folder)
    assert done.code == 0, done.err
    return (*sorted((folder / "work" / "tiny").glob("tiny-*.gguf")), tiny_imatrix)


@pytest.fixture(scope="module")
def answer(made: tuple[Path, ...]) -> dict[str, Any]:
    return ask_hub_parsers([*LABELS, *_published()], made)


def test_the_hub_reads_the_same_labels(answer: dict[str, Any]) -> None:
    names = [*LABELS, *_published()]
    assert len(answer["labels"]) == len(names) > 300
    assert answer["labels"] == [found.text if (found := hub_label(name)) else "" for name in names]


def test_the_hub_knows_the_same_file_types(answer: dict[str, Any]) -> None:
    assert {number: label for label, number in answer["types"].items() if label not in LARGE} == FILE_TYPES
    assert {label for label, number in answer["types"].items() if number not in FILE_TYPES} == set(LARGE)


def test_the_hub_reads_our_levels_and_matrices(answer: dict[str, Any], made: tuple[Path, ...]) -> None:
    assert len(made) == len(LEVELS) + 1
    for path, found in zip(made, answer["files"], strict=True):
        header = read_header(path)
        assert {tensor.name: tuple(found["tensors"][tensor.name]["shape"]) for tensor in header.tensors} == {
            tensor.name: tensor.shape for tensor in header.tensors
        }
        assert {tensor.name: found["tensors"][tensor.name]["type"] for tensor in header.tensors} == {
            tensor.name: tensor.type for tensor in header.tensors
        }
        assert found["metadata"].get("general.file_type") == header.metadata.get("general.file_type")
    assert answer["files"][-1]["metadata"]["imatrix.chunk_count"] == 20
