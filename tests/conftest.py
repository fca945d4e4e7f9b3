"""Fixtures every room shares: the real toolchain, the demo model, a command line in a process of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from imatrix_runner.resources import DEMO_MODEL, resource
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import Ran, RunCommand, run_command
from support.dialogues import TEMPLATE
from support.in_process import CommandLine
from support.llama_sources import fetch_llama_models
from support.llama_tools import BareTools
from support.ray_machines import RayMachines, ray_machines
from support.tiny_models import sample_text, write_llama_gguf

ROOT = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job is started so, and its children inherit it; tests that press Ctrl-C would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the same under nohup


# Tests run side by side, and llama.cpp's threads burn the processor while they wait for each other: by default two of its
# programs take up to twenty times as long on two cores. (The package bounds that for what it starts; tests start some, too.)
os.environ.setdefault("GOMP_SPINCOUNT", "300")


# A loaded machine must not turn a slow example into a failure. The same examples every time; ``--hypothesis-profile thorough``
# looks for others.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("tests", _PATIENT, max_examples=60, derandomize=True)
settings.register_profile("thorough", _PATIENT, max_examples=2000)
settings.load_profile("tests")


_SLOW = (
    *("test_killed", "test_killed_evaluate", "test_killed_imatrix", "test_killed_pass"),
    *("test_embedded_quality", "test_evaluate_levels", "test_single_pass", "test_run_preset"),
    *("test_calibration_build", "test_calibration_templates"),
)
"""Files with the longest tests. They begin first, so that no process is left alone with one while the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in _SLOW)


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    """Real llama.cpp programs: built by ``scripts/test`` into the managed cache (or named by IMATRIX_RUNNER_LLAMA_CPP)."""
    return require(locate(None, env=os.environ, cache=cache_dir()))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return resource(DEMO_MODEL)


@pytest.fixture(scope="session")
def llama_models() -> Path:
    """llama.cpp's own test vocabularies (``ggml-vocab-*.gguf``) and published chat templates (``templates/*.jinja``)."""
    return fetch_llama_models()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting, token or hub of the developer's reaches a test."""
    for name in list(os.environ):
        keep = name in ("IMATRIX_RUNNER_CACHE", "IMATRIX_RUNNER_LLAMA_CPP")
        if name.startswith(("IMATRIX_RUNNER_", "LLAMA_", "HF_", "HUGGING")) and not keep:
            monkeypatch.delenv(name)


@pytest.fixture
def runner(tmp_path: Path) -> RunCommand:
    """Run ``imatrix-runner ARGUMENTS`` in a process of its own, in ``tmp_path``. Further: what :func:`run_command` takes."""

    def run(*arguments: str | Path, cwd: Path | None = None, **further: Any) -> Ran:
        return run_command(*arguments, cwd=cwd or tmp_path, **further)

    return run


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in this process, in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys)


@pytest.fixture(scope="session")
def tools(toolchain: Toolchain) -> BareTools:
    """llama.cpp's programs without us, to compare with."""
    return BareTools(toolchain)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense llama of two layers that knows little but how often each token comes: a level of it takes a tenth of a second."""
    return write_llama_gguf(tmp_path_factory.mktemp("tiny") / "tiny-BF16.gguf", fluent=True)


@pytest.fixture(scope="session")
def machines() -> Iterator[RayMachines]:
    """A Ray cluster of two machines, which are this one."""
    with ray_machines(2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template, which writes BOS and EOS around every message."""
    path = tmp_path_factory.mktemp("chat") / "chat-BF16.gguf"
    return write_llama_gguf(path, metadata={"tokenizer.chat_template": TEMPLATE}, fluent=True)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of about 50 chunks of 128 tokens."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(sample_text(21000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_imatrix(tools: BareTools, tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama-imatrix's own file of the tiny model over 20 chunks of 128 tokens: the same bytes wherever the tests run."""
    out = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    tools.imatrix(tiny_model, Path(tiny_text.name), out, "-c", "128", "--chunks", "20", folder=tiny_text.parent)
    return out
