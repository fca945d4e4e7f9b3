"""The checkpoint: what goes in comes out to the bit, and what is damaged or of another job is told, never used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.jobs import ChunkRange, CollectedRange, Perplexity
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import publish
from imatrix_runner.imatrix.checkpoint import Checkpoint, fingerprint, load, prepare, resume
from imatrix_runner.imatrix.convergence import Point
from imatrix_runner.imatrix.formats import read, write_gguf
from support.synthetic import EXPERTS, expected, one_chunk
from support.values import same_matrix

INPUTS = {"model file": "sha256:" + "a" * 64, "calibration text": "sha256:" + "b" * 64, "chunks": "all from 0"}
RANGES = (ChunkRange(0, 3), ChunkRange(3, 3), ChunkRange(6, 1))
PIECE = CollectedRange(RANGES[0], Path("unused"), 1.25, 0.5, Perplexity(1.1, 2.2, 33))


def saved(path: Path, ranges: tuple[ChunkRange, ...] = RANGES[:2], **changes: object) -> Checkpoint:
    """A checkpoint of ``ranges`` in a file."""
    checkpoint = Checkpoint(INPUTS)
    for index, chunks in enumerate(ranges):
        point = Point(chunks.end, 0.1 / (index + 3), "blk.0.attn_q", 1 / 3) if index else None
        checkpoint = checkpoint.with_range(replace(PIECE, chunks=chunks), expected([chunks]), point)
    checkpoint = replace(checkpoint, **changes)  # type: ignore[arg-type]
    publish(prepare(checkpoint, path), path)
    return checkpoint


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.gguf"
    written = saved(path)
    found = load(path)
    assert found.matrix is not None
    assert written.matrix is not None
    assert same_matrix(found.matrix, written.matrix)
    assert same_matrix(replace(found.matrix, chunk_count=6), replace(expected(RANGES[:2]), chunk_count=6))
    assert replace(found, matrix=None) == replace(written, matrix=None)
    assert (found.chunks, found.perplexity, found.seconds, found.load_seconds) == (6, Perplexity(2.2, 4.4, 66), 2.5, 1.0)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.dictionaries(st.text(), st.text(), max_size=4),
    st.lists(st.tuples(st.integers(0, 1 << 40), FINITE, st.text(), FINITE).map(lambda row: Point(*row)), max_size=4),
    st.tuples(FINITE, FINITE | st.none(), st.integers(0, 1 << 60)),
    FINITE,
)
def test_any_state_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    inputs: dict[str, str],
    curve: list[Point],
    sums: tuple[float, float | None, int],
    seconds: float,
) -> None:
    path = tmp_path_factory.mktemp("round") / "checkpoint.gguf"
    written = saved(path, inputs=inputs, curve=tuple(curve), perplexity=Perplexity(*sums), seconds=seconds)
    assert replace(load(path), matrix=None) == replace(written, matrix=None)


def test_it_may_replace_the_one_it_is_made_of(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.gguf"
    saved(path, RANGES[:1])
    for chunks in RANGES[1:]:
        following = load(path).with_range(replace(PIECE, chunks=chunks), expected([chunks]), None)
        publish(prepare(following, path), path)
    matrix = load(path).matrix
    assert matrix is not None
    assert same_matrix(replace(matrix, chunk_count=7), replace(expected(RANGES), chunk_count=7))
    assert matrix.chunk_count == 7


def test_chunks_are_counted_as_llama_imatrix_counts_them() -> None:
    """By the tokens of the entry that saw most: what its batches lose is lost."""
    chunk = one_chunk(0)
    short = replace(chunk.entries[EXPERTS], counts=chunk.entries[EXPERTS].counts * 0)
    lost = replace(chunk, entries={EXPERTS: short})
    following = Checkpoint(INPUTS).with_range(PIECE, lost, None)
    assert following.matrix is not None
    assert (following.matrix.chunk_count, following.chunks) == (0, 3)


def test_it_is_no_imatrix_for_quantising(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoint.gguf")
    with pytest.raises(InvalidDataError, match="stored as F64"):
        read(tmp_path / "checkpoint.gguf")


def test_the_same_inputs_go_on(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.gguf"
    assert resume(path, INPUTS, RANGES) == (Checkpoint(INPUTS), "")
    saved(path)
    found, why = resume(path, dict(reversed(INPUTS.items())), RANGES)
    assert (found.done, why) == (RANGES[:2], "")


@pytest.mark.parametrize(
    ("inputs", "ranges", "why"),
    [
        ({**INPUTS, "chunks": "5 from 0"}, RANGES, "changed: chunks: all from 0 -> 5 from 0"),
        (
            {**INPUTS, "model file": "sha256:" + "c" * 64},
            RANGES,
            "changed: model file: sha256:aaaaaaaaaaaa -> sha256:cccccccccccc",
        ),
        ({**INPUTS, "engine": "new"}, RANGES, "changed: engine: none -> new"),
        (INPUTS, RANGES[1:], "this version cuts the text into other ranges"),
        (INPUTS, RANGES[:1], "this version cuts the text into other ranges"),
    ],
)
def test_other_inputs_are_named(inputs: dict[str, str], ranges: tuple[ChunkRange, ...], why: str, tmp_path: Path) -> None:
    saved(tmp_path / "checkpoint.gguf")
    assert resume(tmp_path / "checkpoint.gguf", inputs, ranges) == (Checkpoint(inputs), why)


@given(st.data())
def test_no_damage_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut anywhere, or any byte changed: but for padding, which means nothing, it is either told or changes nothing."""
    path = tmp_path_factory.mktemp("damage") / "checkpoint.gguf"
    written = saved(path)
    whole = path.read_bytes()
    cut = data.draw(st.booleans())
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    found, why = resume(path, INPUTS, RANGES)
    if cut:
        assert why
    if why:
        assert found == Checkpoint(INPUTS)
    else:
        assert found.matrix is not None
        assert written.matrix is not None
        assert replace(found, matrix=None) == replace(written, matrix=None)
        for name, entry in written.matrix.entries.items():
            assert found.matrix.entries[name].sums.tobytes() == entry.sums.tobytes()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\0" * 4096, b"no such thing" * 100])
def test_what_is_no_checkpoint_is_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.gguf"
    path.write_bytes(content)
    found, why = resume(path, INPUTS, RANGES)
    assert why
    assert found == Checkpoint(INPUTS)


def test_an_ordinary_imatrix_is_no_checkpoint(tmp_path: Path) -> None:
    write_gguf(one_chunk(1), tmp_path / "checkpoint.gguf")
    assert resume(tmp_path / "checkpoint.gguf", INPUTS, RANGES)[1] == "it is not a checkpoint of this program"


def test_a_fingerprint_is_of_names_and_values() -> None:
    assert fingerprint(INPUTS) == fingerprint(dict(reversed(INPUTS.items())))
    others = [{**INPUTS, "chunks": "1"}, {**INPUTS, "further": ""}, {}]
    assert len({fingerprint(inputs) for inputs in (INPUTS, *others)}) == 4


def test_processors_are_kept_each_once(tmp_path: Path) -> None:
    """Sums of different processors differ in their last bits: the file says which there were."""
    path, state = tmp_path / "checkpoint.gguf", Checkpoint(INPUTS)
    for chunks, processor in zip(RANGES, ("b", "", "a"), strict=True):
        state = state.with_range(replace(PIECE, chunks=chunks, processor=processor), expected([chunks]), None)
    publish(prepare(state, path), path)
    assert load(path).processors == state.processors == ("a", "b")
