"""What several rooms' tests share: an engine over the real programs, and a real imatrix of the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from values import DEMO_CHUNKS, DEMO_CONTEXT

from imatrix_runner.engines.base import ChunkRange, CollectJob, CollectOptions
from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.events import ignore
from imatrix_runner.process import Runner
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.toolchain.probe import Toolchain

# A loaded machine must not turn a slow example into a failure.
settings.register_profile("tests", deadline=None, max_examples=60)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def engine(toolchain: Toolchain) -> BinariesEngine:
    return BinariesEngine(toolchain, Runner())


@pytest.fixture(scope="session")
def demo_imatrix(engine: BinariesEngine, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imatrix of the demo model over the first 12 chunks of 64 tokens of the shipped text."""
    folder = tmp_path_factory.mktemp("imatrix")
    options = CollectOptions(n_ctx=DEMO_CONTEXT, n_batch=512)
    ranges = (ChunkRange(0, DEMO_CHUNKS),)
    job = CollectJob("imatrix", demo_model, resource(CALIBRATION_TEXT), ranges, folder, options, "", None)
    engine.collect(job, ignore, lambda piece: True)
    return (folder / ranges[0].file_name).rename(folder / "imatrix.gguf")
