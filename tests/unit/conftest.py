"""What several rooms' tests share: an engine over the real programs, and a real imatrix of the demo model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import ChunkRange, CollectJob, CollectOptions
from imatrix_runner.events import ignore
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.process import Runner
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.toolchain.probe import Toolchain
from support.values import DEMO_CHUNKS, DEMO_CONTEXT


@pytest.fixture(scope="session")
def engine(toolchain: Toolchain) -> BinariesEngine:
    return BinariesEngine(toolchain, Runner())


@pytest.fixture(scope="session")
def demo_imatrix(engine: BinariesEngine, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imatrix of the demo model over the first 12 chunks of 64 tokens of the shipped text, which it names without the path:
    the same bytes wherever the tests run."""
    folder = tmp_path_factory.mktemp("imatrix")
    options = CollectOptions(n_ctx=DEMO_CONTEXT, n_batch=512)
    ranges = (ChunkRange(0, DEMO_CHUNKS),)
    job = CollectJob("imatrix", demo_model, resource(CALIBRATION_TEXT), ranges, folder, options, "", None)
    engine.collect(job, ignore, lambda piece: True)
    write_gguf(replace(read(folder / ranges[0].file_name).matrix, datasets=(CALIBRATION_TEXT,)), folder / "imatrix.gguf")
    return folder / "imatrix.gguf"
