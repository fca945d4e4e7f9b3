"""``imatrix stats`` against the real ``llama-imatrix --show-statistics``: every printed digit of both its tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix
from imatrix_runner.imatrix.statistics import LayerStatistics, Statistics, TensorStatistics, statistics
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.toolchain.probe import Toolchain
from support.command_line import clean_environment
from support.llama_tools import BareTools
from support.tiny_models import sample_text, write_llama_gguf
from support.values import entry, matrix

CONTEXT = 128
_TRIES = 300
_ANNOUNCED = re.compile(r"\((\d+) (tensors|layers)\)")

Row = tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """The tool's two tables as printed, without padding."""

    tensors: list[Row]
    layers: list[Row]


def shown(toolchain: Toolchain, file: Path, context: int = CONTEXT) -> Shown:
    """The tables of ``--show-statistics``. Its log ends with the process, mostly before all is written: try until it is
    there."""
    plain = ("-m", "x", "-c", str(context), "--no-log-prefix", "--no-log-timestamps", "--log-colors", "off")
    command = [str(toolchain.tool("llama-imatrix")), "--show-statistics", "--in-file", str(file), *plain]
    for _ in range(_TRIES):
        done = subprocess.run(command, env=clean_environment(), capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr.decode()
        told = done.stderr.decode()
        announced = {what: int(count) for count, what in _ANNOUNCED.findall(told)}
        rows = [tuple(cell.strip() for cell in line.split("\t")) for line in told.splitlines() if "\t" in line]
        found = Shown(
            [row for row in rows if len(row) == 13 and row[0] != "Layer"],
            [row for row in rows if len(row) == 4 and row[0] != "Layer"],
        )
        if announced == {"tensors": len(found.tensors), "layers": len(found.layers)}:
            return found
    pytest.fail(f"llama-imatrix lost its log {_TRIES} times")


def tensor_row(item: TensorStatistics) -> Row:
    """As llama.cpp's ``show_statistics`` prints it."""
    figures = (
        *(f"{item.total:.2f}", f"{item.minimum:.4f}", f"{item.maximum:.4f}", f"{item.mean:.2f}", f"{item.deviation:.2f}"),
        *(f"{item.active_percent:.2f}%", str(item.elements), f"{item.entropy:.4f}", f"{item.entropy_percent:.2f}%"),
        *(f"{item.zd_percent:.2f}%", f"{item.cosine:.4f}"),
    )
    return ("-" if item.layer is None else str(item.layer), item.tensor, *figures)


def layer_row(item: LayerStatistics) -> Row:
    return str(item.layer), f"{item.total:.2f}", f"{item.zd_percent:.4f}%", f"{item.cosine:.4f}"


def same(found: Statistics, there: Shown) -> None:
    assert sorted(map(tensor_row, found.tensors)) == sorted(there.tensors)
    assert list(map(layer_row, found.layers)) == there.layers


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats-text") / "words.txt"
    path.write_text(sample_text(9000), encoding="utf-8")
    return path


def test_a_dense_llama(toolchain: Toolchain, tiny_imatrix: Path) -> None:
    same(statistics(read(tiny_imatrix).matrix), shown(toolchain, tiny_imatrix))


def test_a_mixture_of_experts_some_of_them_untouched(
    toolchain: Toolchain, tools: BareTools, text: Path, tmp_path: Path
) -> None:
    model = write_llama_gguf(tmp_path / "moe-BF16.gguf", experts=4, layers=3)
    made = tmp_path / "made.gguf"
    tools.imatrix(model, text, made, "-c", str(CONTEXT), "--chunks", "8")
    same(statistics(read(made).matrix), shown(toolchain, made))

    # Take all tokens from one expert of a layer, and all data from a tensor of another.
    entries = dict(read(made).matrix.entries)
    starved, emptied = "blk.1.ffn_down_exps.weight", "blk.2.attn_q.weight"
    entries[starved].sums[2] = 0
    entries[starved].counts[2] = 0
    entries[emptied].sums[:] = 0
    entries[emptied].counts[:] = 0
    lacking = tmp_path / "lacking.gguf"
    write_gguf(Matrix(entries, CONTEXT, 8, ("words.txt",)), lacking)
    found = statistics(read(lacking).matrix)
    same(found, shown(toolchain, lacking))
    assert found.without_data == (emptied,)
    assert {item.name: item.without_tokens for item in found.experts if item.without_tokens} == {starved: 1}


def as_phi3(llama: Path, path: Path) -> Path:
    """The same weights as another architecture: phi3 has q, k, v in one tensor, and gate and up in another."""
    from gguf import GGUFReader, GGUFWriter

    reader, writer = GGUFReader(llama), GGUFWriter(path, "phi3")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind, inner = (*field.types, None)[:2]
            writer.add_key_value(key.replace("llama.", "phi3."), field.contents(), kind, inner)
    joined = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}
    rows: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        name = re.sub(r"attn_[qkv]\b|ffn_gate\b", lambda found: joined[found[0]], tensor.name)
        rows.setdefault(name, []).append(tensor)
    for name, parts in rows.items():
        writer.add_tensor(name, np.concatenate([part.data for part in parts]), raw_dtype=parts[0].tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_another_architecture(toolchain: Toolchain, tools: BareTools, text: Path, tmp_path: Path) -> None:
    model = as_phi3(write_llama_gguf(tmp_path / "llama.gguf", layers=3), tmp_path / "phi3.gguf")
    made = tmp_path / "made.gguf"
    tools.imatrix(model, text, made, "-c", str(CONTEXT), "--chunks", "8")
    found = statistics(read(made).matrix)
    assert {item.tensor for item in found.tensors} == {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}
    same(found, shown(toolchain, made))


def test_the_demo_model(toolchain: Toolchain, tools: BareTools, demo_model: Path, tmp_path: Path) -> None:
    made = tmp_path / "demo.gguf"
    tools.imatrix(demo_model, resource(CALIBRATION_TEXT), made, "-c", "64", "--chunks", "6", "--process-output")
    same(statistics(read(made).matrix), shown(toolchain, made, 64))


def test_a_legacy_file(toolchain: Toolchain, tools: BareTools, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    made = tmp_path / "legacy.dat"
    tools.imatrix(tiny_model, text, made, "-c", str(CONTEXT), "--chunks", "4", "--output-format", "dat")
    same(statistics(read(made).matrix), shown(toolchain, made))


def _awkward() -> Iterator[tuple[str, object]]:
    """Widths, ranges and zeros that no tiny model has; wide enough that the rounding of float32 shows."""
    random = np.random.default_rng(7)
    for layer in range(4):
        for experts, columns, spread in ((1, 11008, 3.0), (40, 2048, 2.0), (7, 33, 0.1)):
            sums = np.exp(spread * random.standard_normal((experts, columns))) * 10.0 ** random.integers(-4, 6)
            sums[random.random(sums.shape) < 0.05] = 0
            counts = random.integers(1, 40000, experts)
            yield f"blk.{layer}.t{columns}.weight", entry(sums.astype(np.float32), counts)
    yield "blk.0.zeros.weight", entry([0, 0, 0], 5)
    yield "output.weight", entry(np.arange(1000), 100003)
    yield "dec.blk.12.attn_v.bias", entry([1, 2, 3], 7)
    yield "blk.2.even.weight", entry([4, 4, 4, 4], 3)
    yield "blk.3.even.weight", entry([4, 4, 4, 4], 9)


def test_awkward_numbers(toolchain: Toolchain, tmp_path: Path) -> None:
    file = tmp_path / "awkward.gguf"
    write_gguf(matrix(dict(_awkward())), file)
    same(statistics(read(file).matrix), shown(toolchain, file))
