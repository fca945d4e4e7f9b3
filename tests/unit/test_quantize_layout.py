"""Odd sources: what the plan says of them is what becomes of them, and the option that it names mends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.quantize.recipe import written_shape
from imatrix_runner.quantize.verify import verify_output
from support.recipes import make
from support.tiny_models import write_llama_gguf

ODD = "blk.0.odd.weight"
ALIGNED = QuantizeOptions(override_kv=("general.alignment=int:32",))


def kept(name: str) -> QuantizeOptions:
    return QuantizeOptions(tensor_types=(f"^{ODD}$={name}",))


def array(kind: str, *shape: int) -> dict[str, Any]:
    return {"arrays": {ODD: np.ones(shape, kind)}}


@pytest.mark.parametrize(
    ("source", "why", "mended"),
    [
        ({"alignment": 64}, "copies general.alignment = 64", ALIGNED),
        ({"alignment": 4096}, "copies general.alignment = 4096", ALIGNED),
        ({"alignment": 16}, "", None),  # every size here is a multiple of 32 too
        (array("i4", 4, 256), f"{ODD} is I32", kept("i32")),
        (array("f8", 4, 256), f"{ODD} is F64", kept("f64")),
        (array("f4", 2, 2, 2, 256), f"{ODD} has 4 dimensions", kept("f32")),
        (array("f4", 0, 256), f"{ODD} has no elements", None),
        # Dimensions of 1 at the end are dropped by ggml; spaces are no end of a name.
        (array("f4", 1, 3, 2, 256), "", None),
        (array("f4", 1, 1, 256), "", None),
        ({"arrays": {"blk.0.an odd - name.weight": np.ones((4, 256), "f4")}}, "", None),
    ],
    ids=["align64", "align4096", "align16", "I32", "F64", "4-D", "empty", "3-D as 4-D", "1-D as 3-D", "spaces"],
)
def test_the_verdict_on_an_odd_source_is_right(
    engine: BinariesEngine, tmp_path: Path, source: dict[str, Any], why: str, mended: QuantizeOptions | None
) -> None:
    model = write_llama_gguf(tmp_path / "m.gguf", layers=1, vocab=300, **source)
    assert foretold(engine, model, tmp_path / "o.gguf", QuantizeOptions()) == why
    if mended is not None:
        assert foretold(engine, model, tmp_path / "mended.gguf", mended) == ""


def foretold(engine: BinariesEngine, model: Path, out: Path, options: QuantizeOptions) -> str:
    """The beginning of the reason foretold for Q4_K_M, empty if there is none; checked against what becomes of it."""
    made = make(engine, model, "Q4_K_M", out, None, options)
    failures = made.recipe.failures
    try:
        good = made.succeeded and verify_output([out], made.recipe, None) == made.recipe.file_bytes
    except InvalidDataError:
        good = False
    assert good is not bool(failures)
    if not failures:
        assert {tensor.name for tensor in read_header(out).tensors} == {tensor.name for tensor in read_header(model).tensors}
        return ""
    for option in options_named(failures[0].todo):
        assert option in ("--override-kv", "--tensor-type")
    text = failures[0].why
    return text.partition(",")[0].removeprefix("llama-quantize pads to 32 bytes and ")


def options_named(todo: str) -> list[str]:
    return [word for word in todo.split() if word.startswith("--")]


@pytest.mark.parametrize(
    ("shape", "written"), [((4, 1), (4,)), ((1, 1), (1,)), ((4, 1, 3), (4, 1, 3)), ((4, 2, 1, 1), (4, 2)), ((7,), (7,))]
)
def test_shapes_lose_their_last_ones(shape: tuple[int, ...], written: tuple[int, ...]) -> None:
    assert written_shape(shape) == written
