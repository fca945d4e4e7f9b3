"""Plans of covariances, and their files: written and read back, torn, damaged, listed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from imatrix_runner.engines.covariance_jobs import WeightInput, grouped, triangle
from imatrix_runner.engines.files.covariance_file import (
    INDEX,
    VERSION,
    CovarianceHead,
    file_name,
    read_covariance,
    read_covariance_head,
    remove_others,
    set_fingerprint,
    stored_covariances,
    write_covariance,
    write_covariance_index,
)
from imatrix_runner.engines.jobs import ChunkRange
from imatrix_runner.engines.worker.collect.covariance_callback import InputSums
from imatrix_runner.engines.worker.collect.unfinished_sums import find_unfinished, save_unfinished
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.imatrix.covariances import expected_inputs, plan_covariances, wanted_weights
from imatrix_runner.models.model import open_gguf
from support.tiny_models import write_llama_gguf


def test_inputs_are_cut_into_consecutive_groups_that_fit() -> None:
    inputs = [WeightInput((str(number),), columns) for number, columns in enumerate((3, 3, 10, 3, 2, 2))]
    sizes = [each.sum_bytes for each in inputs]
    assert sizes == [48, 48, 440, 48, 24, 24]
    for memory in (0, 48, 96, 100, 500, 1000):
        groups = list(grouped(inputs, memory))
        assert [each for group in groups for each in group] == inputs
        for group, after in zip(groups, [*groups[1:], None], strict=True):
            size = sum(each.sum_bytes for each in group)
            assert size <= memory or len(group) == 1
            assert after is None or size + after[0].sum_bytes > memory
    assert list(grouped([], 1)) == []


def test_the_plan_of_a_model(tmp_path: Path) -> None:
    """Two layers of four inputs; with less memory the text is computed more often, and nothing takes more than that."""
    model = open_gguf(write_llama_gguf(tmp_path / "m.gguf"), allow_requantize=False)
    weights = wanted_weights(model, process_output=False)
    assert len(weights) == 14
    inputs = expected_inputs(model, weights)
    assert [sorted(each.weights) for each in inputs[:4]] == [
        [f"blk.0.attn_{part}.weight" for part in "kqv"],
        ["blk.0.attn_output.weight"],
        ["blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"],
        ["blk.0.ffn_down.weight"],
    ]
    layer = 8 * (3 * triangle(256) + triangle(512))
    ranges = (ChunkRange(0, 3), ChunkRange(7, 2))
    whole = plan_covariances(model, inputs, ranges, 128, 2 * layer)
    assert (whole.inputs, whole.runs, whole.n_chunks, whole.n_tokens) == (8, 1, 5, 640)
    assert (whole.memory_bytes, whole.disk_bytes) == (2 * layer, 3 * layer)
    by_layer = plan_covariances(model, inputs, ranges, 128, layer)
    assert (by_layer.runs, by_layer.memory_bytes, by_layer.disk_bytes) == (2, layer, 2 * layer)
    assert by_layer.effort == pytest.approx(whole.effort + 0.5)
    assert [each.weights for each in expected_inputs(model, wanted_weights(model, process_output=True))][-1] == (
        "output.weight",
    )


def test_the_plan_of_a_mixture(tmp_path: Path) -> None:
    model = open_gguf(write_llama_gguf(tmp_path / "m.gguf", experts=4, layers=1, tied=True), allow_requantize=False)
    inputs = expected_inputs(model, wanted_weights(model, process_output=True))
    assert {(tuple(sorted(each.weights)), each.columns, each.matrices) for each in inputs[-3:]} == {
        (("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"), 256, 4),
        (("blk.0.ffn_down_exps.weight",), 512, 4),
        (("token_embd.weight",), 256, 1),
    }
    assert inputs[-1].weights == ("token_embd.weight",)


def some_sums(matrices: int, n: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(n).standard_normal((matrices, triangle(n)))


@pytest.mark.parametrize("n", [1, 2, 5, 255, 256, 257, 700])
def test_a_covariance_is_read_as_it_was_written(n: int, tmp_path: Path) -> None:
    """The mean of the sums in float32, whole and symmetric; zero where there was no token."""
    path, sums = tmp_path / file_name(3), some_sums(3, n)
    sums[1] = 0
    head = CovarianceHead(VERSION, "print", ("a", "b"), n, (7, 0, 1))
    write_covariance(path, head, lambda matrix: sums[matrix])
    assert read_covariance_head(path) == head
    for matrix, tokens in enumerate((7, 1, 1)):
        expected = np.zeros((n, n), np.float32)
        expected[np.triu_indices(n)] = (sums[matrix] / tokens).astype(np.float32)
        expected = np.triu(expected) + np.triu(expected, 1).T
        found = read_covariance(path, matrix)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)
    for matrix in (-1, 3):
        with pytest.raises(InvalidDataError, match="cannot be used"):
            read_covariance(path, matrix)


def test_a_torn_or_damaged_covariance_is_refused(tmp_path: Path) -> None:
    """Cut anywhere, longer, or with any byte of its numbers changed."""
    path, sums = tmp_path / file_name(0), some_sums(2, 3)
    write_covariance(path, CovarianceHead(VERSION, "print", ("a",), 3, (2, 2)), lambda matrix: sums[matrix])
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        with pytest.raises(InvalidDataError):
            read_covariance(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InvalidDataError, match="cannot be used"):
        read_covariance(path)
    for at in range(start, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        refused = 0
        for matrix in (0, 1):
            try:
                read_covariance(path, matrix)
            except InvalidDataError:
                refused += 1
        assert refused == 1
    with pytest.raises(InvalidDataError):
        read_covariance(tmp_path / "none")


def a_set(folder: Path, fingerprint: str = "print") -> dict[str, CovarianceHead]:
    sums = some_sums(1, 3)
    heads = {
        file_name(number): CovarianceHead(VERSION, fingerprint, (f"w{number}", f"v{number}"), 3, (5,)) for number in (0, 1)
    }
    for name, head in heads.items():
        write_covariance(folder / name, head, lambda matrix: sums[matrix])
    write_covariance_index(folder, fingerprint, heads)
    return heads


def test_a_set_counts_when_it_is_whole(tmp_path: Path) -> None:
    heads = a_set(tmp_path)
    found = stored_covariances(tmp_path)
    assert {name: each.path.name for name, each in found.items()} == {
        weight: file for file, head in heads.items() for weight in head.weights
    }
    assert stored_covariances(tmp_path, "print") == found
    assert stored_covariances(tmp_path, "other") == {}
    assert set_fingerprint(tmp_path) == "print"
    index = (tmp_path / INDEX).read_bytes()
    for wrong in (b'"../000000.covariance"', b'"/etc/passwd"', b'"x"'):
        (tmp_path / INDEX).write_bytes(index.replace(b'"000000.covariance"', wrong))
        assert stored_covariances(tmp_path) == {}
    (tmp_path / INDEX).write_bytes(index)
    (tmp_path / file_name(1)).write_bytes((tmp_path / file_name(0)).read_bytes())
    assert stored_covariances(tmp_path) == {}
    assert stored_covariances(tmp_path / "none") == {}
    assert set_fingerprint(tmp_path / "none") == ""


def test_what_belongs_to_another_set_is_removed(tmp_path: Path) -> None:
    a_set(tmp_path)
    (tmp_path / ".000001.covariance.part").write_bytes(b"torn")
    (tmp_path / "notes.txt").write_text("the user's", encoding="utf-8")
    (tmp_path / file_name(2)).write_bytes(b"damaged")
    remove_others(tmp_path, "print")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*map(file_name, (0, 1)), INDEX, "notes.txt"]
    remove_others(tmp_path, "other")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unfinished_sums_come_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "sums"
    inputs = [WeightInput(("a",), 5, 2), WeightInput(("b", "c"), 3)]
    sums = [InputSums.zero(each) for each in inputs]
    for each in sums:
        each.sums[:] = some_sums(each.input.matrices, each.input.columns)
        each.counts[:] = range(7, 7 + each.input.matrices)
    save_unfinished(path, "print", 4, sums)
    assert find_unfinished(path, "other") is None
    assert find_unfinished(tmp_path / "none", "print") is None
    found = find_unfinished(path, "print")
    assert found is not None
    assert (found.batches, found.inputs) == (4, tuple(inputs))
    for wanted in (inputs, inputs[1:], inputs[:1], inputs[::-1]):
        loaded = found.load(wanted)
        assert loaded is not None
        for each in loaded:
            expected = sums[inputs.index(each.input)]
            assert np.array_equal(each.sums, expected.sums)
            assert np.array_equal(each.counts, expected.counts)
    assert found.load([WeightInput(("d",), 3)]) is None
    save_unfinished(tmp_path / "later", "print", 5, sums)
    whole = path.read_bytes()
    path.write_bytes((tmp_path / "later").read_bytes())
    assert found.load(inputs) is None
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        assert find_unfinished(path, "print") is None
    for at in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert found.load(inputs) is None
    head = msgspec.json.decode(whole[: whole.index(b"\n")])
    assert set(head) == {"version", "fingerprint", "batches", "inputs"}
