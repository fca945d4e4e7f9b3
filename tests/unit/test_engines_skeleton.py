"""A model's skeleton is quantised to the types and row sizes that the model itself would get."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.binaries.handover import Handover
from imatrix_runner.engines.binaries.skeleton import is_yet_to_be_made, make_skeleton
from imatrix_runner.engines.files.imatrix_weights import read_weights
from imatrix_runner.engines.jobs import QuantizeJob, QuantizeOptions
from imatrix_runner.events import ignore
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.models.gguf_file import read_header
from support.forks import rename_type
from support.tiny_architectures import write_architecture
from support.values import entry, matrix

TYPES = ("Q4_K_M", "IQ3_XXS", "Q2_K_S", "IQ2_M", "Q8_0")


def job(model: Path, ftype: str, imatrix: Path | None) -> QuantizeJob:
    return QuantizeJob("level", model, Path("unused"), ftype, QuantizeOptions(), imatrix, 1, None)


@pytest.mark.parametrize("ftype", TYPES)
def test_types_are_those_of_the_dry_run(ftype: str, engine: BinariesEngine, demo_model: Path, demo_imatrix: Path) -> None:
    asked = job(demo_model, ftype, demo_imatrix)
    told, planned = engine.dry_run(asked), engine._try_skeleton(asked)
    assert (planned.types, planned.fallbacks) == (told.types, told.fallbacks)
    assert (told.certain, told.row_bytes) == (True, {})


@pytest.mark.parametrize("ftype", ["Q4_K_M", "IQ3_XXS"])
def test_experts_and_a_matrix_that_is_yet_to_be_made(ftype: str, engine: BinariesEngine, tmp_path: Path) -> None:
    """The plan's stand-in has the names that collecting will give, with one value each."""
    model, stand_in = write_architecture("qwen3moe", tmp_path / "moe.gguf"), tmp_path / "imatrix.gguf"
    weights = [tensor.name for tensor in read_header(model).tensors if len(tensor.shape) > 1 and tensor.name[:4] == "blk."]
    write_gguf(matrix(dict.fromkeys(weights, entry([1], 1))), stand_in)
    asked = job(model, ftype, stand_in)
    assert is_yet_to_be_made(asked)
    assert engine._try_skeleton(asked).types == engine.dry_run(asked).types


def test_it_is_small_and_keeps_what_decides(demo_model: Path, demo_imatrix: Path, tmp_path: Path) -> None:
    skeleton = make_skeleton(job(demo_model, "Q4_K_M", demo_imatrix), tmp_path).job
    small, whole = read_header(skeleton.source), read_header(demo_model)
    assert [tensor.name for tensor in small.tensors] == [tensor.name for tensor in whole.tensors]
    assert [tensor.type for tensor in small.tensors] == [tensor.type for tensor in whole.tensors]
    assert [tensor.shape[0] for tensor in small.tensors] == [tensor.shape[0] for tensor in whole.tensors]
    assert small.metadata == whole.metadata
    assert small.file_size < whole.file_size / 4
    assert skeleton.imatrix is not None
    assert read_weights(skeleton.imatrix).values.keys() == read_weights(demo_imatrix).values.keys()


def test_rows_of_a_type_that_is_known_to_nobody_are_measured(engine: BinariesEngine, demo_model: Path, tmp_path: Path) -> None:
    skeleton = make_skeleton(job(demo_model, "IQ4_NL", None), tmp_path)
    engine.quantize(skeleton.job, ignore)
    rename_type(skeleton.job.out)
    types = {tensor.name: "iq4_k" for tensor in read_header(skeleton.job.out).tensors if tensor.n_bytes is None}
    assert skeleton.row_bytes(types) == {("IQ4_K", 256): 256 // 32 * 18, ("IQ4_K", 512): 512 // 32 * 18}


def test_a_converted_matrix_has_the_very_same_values(demo_imatrix: Path, tmp_path: Path) -> None:
    handover = Handover("dat", tmp_path)
    copy = handover.path(demo_imatrix)
    assert copy == handover.path(demo_imatrix) != demo_imatrix
    assert (copy.name, read(copy).format) == (demo_imatrix.name, "dat")
    before, after = read_weights(demo_imatrix), read_weights(copy)
    assert (after.dataset, after.chunks) == (before.dataset, before.chunks)
    assert after.values.keys() == before.values.keys()
    assert all((after.values[name] == before.values[name]).all() for name in before.values)
    assert handover.path(copy) == copy
    assert Handover("gguf", tmp_path).path(demo_imatrix) == demo_imatrix
