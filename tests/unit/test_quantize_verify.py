"""A written file is the planned one, or it gets no name: every kind of damage is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.quantize.recipe import Recipe, UsableImatrix
from imatrix_runner.quantize.verify import verify_output
from support.forks import OWN, rename_type
from support.recipes import Made, make

QUERY = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def made(engine: BinariesEngine, demo_model: Path, demo_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(engine, demo_model, "Q4_K_M", tmp_path_factory.mktemp("verify") / "o.gguf", demo_imatrix)


def refusal(path: Path, recipe: Recipe, weights: UsableImatrix | None) -> str:
    with pytest.raises(InvalidDataError) as caught:
        verify_output([path], recipe, weights)
    return f"{caught.value.what}: {caught.value.why}"


def changed(recipe: Recipe, tensor: str, **changes: object) -> Recipe:
    """The plan with one tensor planned otherwise."""
    rows = tuple(replace(row, **changes) if row.name == tensor else row for row in recipe.tensors)  # type: ignore[arg-type]
    return replace(recipe, tensors=rows)


def test_a_good_file_passes_and_tells_its_size(made: Made) -> None:
    assert verify_output([made.out], made.recipe, made.weights) == made.out.stat().st_size == made.recipe.file_bytes


def cut(data: bytes) -> bytes:
    return data[:-1000]


def lengthened(data: bytes) -> bytes:
    return data + b"\0" * 32


def without_header(data: bytes) -> bytes:
    """As a killed llama-quantize leaves it."""
    return b"\0" * 4096 + data[4096:]


def renamed_tensor(data: bytes) -> bytes:
    return data.replace(QUERY.encode(), QUERY.replace("attn_q", "attn_x").encode())


def without_file_type(data: bytes) -> bytes:
    return data.replace(b"general.file_type", b"general.file_tipe")


def without_version(data: bytes) -> bytes:
    return data.replace(b"general.quantization_version", b"general.quantization_persion")


def without_entries(data: bytes) -> bytes:
    return data.replace(b"imatrix.entries_count", b"imatrix.entries_kount")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "truncated"),
        (lengthened, "bytes instead of"),
        (without_header, "not a GGUF"),
        (lambda _data: b"", "empty"),
        (renamed_tensor, "the first that differs is blk.0.attn_q.weight"),
        (without_file_type, "how it was quantised"),
        (without_version, "how it was quantised"),
        (without_entries, "no imatrix entries instead of"),
    ],
)
def test_a_damaged_file_is_refused(made: Made, tmp_path: Path, damage: Callable[[bytes], bytes], told: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(made.out.read_bytes()))
    assert told in refusal(bad, made.recipe, made.weights)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shape": (128, 512)}, f"{QUERY} has the shape (256, 256) instead of (128, 512)"),
        ({"type": "Q6_K"}, f"{QUERY} is Q4_K of 36864 bytes, planned: Q6_K"),
        ({"n_bytes": 1}, "planned: Q4_K of 1"),
        ({"name": "other"}, "the first that differs is blk.0.attn_q.weight"),
    ],
)
def test_a_file_of_another_plan_is_refused(made: Made, changes: dict[str, object], told: str) -> None:
    assert told in refusal(made.out, changed(made.recipe, QUERY, **changes), made.weights)


def test_a_lacking_and_a_surplus_tensor_are_refused(made: Made) -> None:
    shorter = replace(made.recipe, tensors=made.recipe.tensors[1:])
    longer = replace(made.recipe, tensors=(*made.recipe.tensors, replace(made.recipe.tensors[0], name="zzz")))
    count = len(made.recipe.tensors)
    assert f"{count} tensors instead of {count - 1}" in refusal(made.out, shorter, made.weights)
    assert "the first that differs is zzz" in refusal(made.out, longer, made.weights)


def test_a_file_made_with_other_weights_is_refused(made: Made) -> None:
    assert made.weights is not None
    fewer = replace(made.weights, sizes={QUERY: 256})
    assert "28 imatrix entries instead of 1" in refusal(made.out, made.recipe, fewer)
    assert "28 imatrix entries instead of none" in refusal(made.out, made.recipe, None)


def test_a_type_only_the_tools_know_is_taken_on_trust(made: Made) -> None:
    """A fork's type has no size that could be checked; names and shapes still are."""
    recipe = changed(made.recipe, QUERY, type="Q3_K_HIFI", n_bytes=None)
    assert verify_output([made.out], recipe, made.weights)
    with pytest.raises(InvalidDataError):
        verify_output([made.out], changed(recipe, QUERY, shape=(1, 1)), made.weights)


def test_a_type_that_only_its_maker_knows_is_checked_by_its_planned_size(
    engine: BinariesEngine, demo_model: Path, tmp_path: Path
) -> None:
    made = make(engine, demo_model, "IQ4_NL", tmp_path / "o.gguf", None)
    rename_type(made.out)
    rows = tuple(replace(row, type=OWN) if row.type == "IQ4_NL" else row for row in made.recipe.tensors)
    recipe = replace(made.recipe, tensors=rows)
    size = made.out.stat().st_size
    assert verify_output([made.out], recipe, None) == size
    assert "planned: IQ4_NL" in refusal(made.out, made.recipe, None)
    with made.out.open("ab") as file:
        file.write(bytes(32))
    assert "the file has" in refusal(made.out, recipe, None)


def test_types_that_were_planned_with_a_skeleton_may_come_out_otherwise(made: Made) -> None:
    recipe = changed(made.recipe, QUERY, type="Q6_K", n_bytes=1)
    assert "planned: Q6_K" in refusal(made.out, recipe, made.weights)
    assert verify_output([made.out], replace(recipe, certain=False), made.weights) == made.out.stat().st_size
