"""Fixtures every room shares: the real toolchain, the demo model, a command line in a process of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from command_line import Ran, RunCommand, run_command
from dialogues import TEMPLATE
from in_process import CommandLine
from llama_sources import fetch_llama_models
from llama_tools import BareTools
from tiny_models import sample_text, write_llama_gguf

from imatrix_runner.resources import DEMO_MODEL, resource
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir

ROOT = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job is started so, and its children inherit it; tests that press Ctrl-C would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the same under nohup


# Tests run side by side, and llama.cpp's threads burn the processor while they wait for each other: by default two of its
# programs take up to twenty times as long on two cores. (The package bounds that for what it starts; tests start some, too.)
os.environ.setdefault("GOMP_SPINCOUNT", "300")


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
    """Run ``imatrix-runner ARGUMENTS`` in a process of its own, in ``tmp_path``."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None, seconds: float = 300) -> Ran:
        return run_command(*arguments, cwd=cwd or tmp_path, env=env, seconds=seconds)

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
    """llama-imatrix's own file of the tiny model over 20 chunks of 128 tokens."""
    out = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    tools.imatrix(tiny_model, tiny_text, out, "-c", "128", "--chunks", "20")
    return out
