"""Conversion: first around a stand-in for the converter (a real child process), then llama.cpp's own with torch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imatrix_runner.errors import EngineError, InterruptedRunError, InvalidDataError, NoSpaceError, ToolchainError
from imatrix_runner.events import Event, Finished, Progress, Saved
from imatrix_runner.extras import Extra
from imatrix_runner.models.convert import OutType, convert
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.model import open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.locate import locate
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.tiny_models import DType, sample_text, write_hf_directory, write_llama_gguf

STAND_IN = """
import shutil, sys, time
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
for percent in (0, 40, 40, 100):
    print(f"\\rWriting: {percent:3d}%|### | 1.0M/2.0M", end="", file=sys.stderr, flush=True)
"""
COPY = STAND_IN + "shutil.copy(GGUF, arguments['--outfile'])\n"

Convert = Callable[..., Path]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_hf_directory(tmp_path / "tiny", layers=1)


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def run(directory: Path, tmp_path: Path, events: list[Event]) -> Convert:
    def call(converter: Path, outtype: OutType = "auto", *, trust: bool = False, runner: Runner | None = None) -> Path:
        return convert(
            directory,
            tmp_path / "work" / "tiny-BF16.gguf",
            converter=converter,
            outtype=outtype,
            mmproj=False,
            trust_remote_code=trust,
            runner=runner or Runner(),
            sink=events.append,
            log=tmp_path / "logs" / "convert.log",
            name="Tiny",
        )

    return call


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setattr("imatrix_runner.models.convert.CONVERT", Extra("convert", ()))
    gguf = write_llama_gguf(tmp_path / "made.gguf", layers=1)

    def write(script: str) -> Path:
        path = tmp_path / "converter.py"
        path.write_text(f"GGUF = {str(gguf)!r}\n{script}")
        return path

    return write


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "work").iterdir())


def test_publishes_what_it_verified(run: Convert, stand_in: Callable[[str], Path], tmp_path: Path, events: list[Event]) -> None:
    out = run(stand_in(COPY))
    assert left_over(tmp_path) == [out.name]
    assert [event.done for event in events if isinstance(event, Progress)] == [0, 40, 100]
    assert isinstance(events[-2], Finished)
    assert isinstance(events[-1], Saved)
    assert events[-1].bytes == out.stat().st_size
    log = (tmp_path / "logs" / "convert.log").read_text()
    assert "--outtype bf16" in log
    assert "--model-name Tiny" in log


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "import sys; print('ERROR:hf-to-gguf:Model FooForCausalLM is not supported', file=sys.stderr); sys.exit(1)",
            "FooForCausalLM",
        ),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized - update')", "pre-tokenizer"),
        ("open('/absent/model.file')", "No such file"),
        ("raise ValueError('nobody expected this')", "nobody expected this"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_failures_keep_the_telling_line_and_the_log(
    run: Convert, stand_in: Callable[[str], Path], tmp_path: Path, events: list[Event], script: str, said: str
) -> None:
    with pytest.raises(EngineError) as caught:
        run(stand_in(script))
    assert said in caught.value.why
    assert str(tmp_path / "logs" / "convert.log") in caught.value.todo
    assert left_over(tmp_path) == []
    assert isinstance(events[-1], Finished)
    assert events[-1].status == "failed"


def test_a_full_disk_and_a_missing_package_have_their_own_codes(run: Convert, stand_in: Callable[[str], Path]) -> None:
    with pytest.raises(NoSpaceError):
        run(stand_in("raise OSError(28, 'No space left on device')"))
    with pytest.raises(ToolchainError, match="no_such_package"):
        run(stand_in("import no_such_package"))


def test_a_half_file_is_never_published(run: Convert, stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    half = "data = open(GGUF, 'rb').read(); open(arguments['--outfile'], 'wb').write(data[: len(data) // 2])\n"
    with pytest.raises(InvalidDataError, match="truncated"):
        run(stand_in(STAND_IN + half))
    assert left_over(tmp_path) == []


def test_a_stop_leaves_nothing(run: Convert, stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    runner = Runner(on_child=lambda _pid, _alive: runner.stop.request())
    with pytest.raises(InterruptedRunError):
        run(stand_in(COPY + "time.sleep(60)\n"), runner=runner)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("trust", [False, True])
def test_no_token_reaches_the_converter(
    trust: bool, run: Convert, stand_in: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trust, it runs code that came with the model."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "very-secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HTTPS_PROXY", "http://user:very-secret@proxy")
    converter = stand_in(COPY + "import os; print('environment:', dict(os.environ), os.getcwd(), sys.path)\n")
    run(converter, trust=trust)
    said = (tmp_path / "logs" / "convert.log").read_text().partition("environment:")[2]
    assert str(tmp_path / "hub") in said
    assert "HF_HUB_DISABLE_IMPLICIT_TOKEN" in said
    assert ("HTTPS_PROXY" in said) is trust  # only then may it fetch anything
    assert "very-secret" not in said.replace("user:very-secret@proxy", "")


def test_models_with_code_need_trust(run: Convert, stand_in: Callable[[str], Path], directory: Path, tmp_path: Path) -> None:
    (directory / "modeling_tiny.py").write_text("raise SystemExit")
    converter = stand_in(COPY + "import os; print('offline:', os.environ.get('HF_HUB_OFFLINE'))\n")
    with pytest.raises(InvalidDataError, match="contains its own code"):
        run(converter)
    run(converter, trust=True)
    (directory / "modeling_tiny.py").unlink()
    run(converter)
    assert "offline: 1" in (tmp_path / "logs" / "convert.log").read_text()


def test_space_and_tools_are_checked_first(
    run: Convert, stand_in: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter = stand_in(COPY)
    with pytest.raises(ToolchainError, match="there is no"):
        run(tmp_path / "absent.py")
    monkeypatch.setattr("imatrix_runner.files.free_bytes", lambda _path: 1 << 20)
    with pytest.raises(NoSpaceError, match="conversion of tiny"):
        run(converter)
    monkeypatch.setattr("imatrix_runner.models.convert.CONVERT", Extra("convert", ("no_such_package",)))
    with pytest.raises(ToolchainError, match="no_such_package") as caught:
        run(converter)
    assert "imatrix-runner[convert]" in caught.value.todo


@pytest.fixture(scope="module")
def toolchain() -> Toolchain:
    """The llama.cpp that the program itself would find."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "sentencepiece")):
        pytest.skip("the convert extra is not installed")
    found = locate(None, env=os.environ, cache=cache_dir()).toolchain
    if found is None or found.converter is None:
        pytest.skip("no llama.cpp with its converter was found")
    return found


@pytest.fixture
def converter(toolchain: Toolchain) -> Path:
    assert toolchain.converter is not None
    return toolchain.converter


@pytest.mark.convert
@pytest.mark.parametrize(("dtype", "expected"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
def test_the_real_converter_keeps_the_type(
    run: Convert, converter: Path, directory: Path, events: list[Event], dtype: DType, expected: str
) -> None:
    write_hf_directory(directory, layers=1, dtype=dtype)
    model = open_gguf(run(converter), allow_requantize=False)
    assert model.main_type == expected
    assert model.architecture == "llama"
    assert model.header.text("general.name") == "Tiny"
    assert any(isinstance(event, Progress) and event.done == 100 for event in events)


@pytest.mark.convert
def test_llama_cpp_accepts_what_was_converted(run: Convert, converter: Path, toolchain: Toolchain, tmp_path: Path) -> None:
    out = run(converter, "f16")
    (tmp_path / "text.txt").write_text(sample_text(6000))
    imatrix, quantised = tmp_path / "imatrix.gguf", tmp_path / "q4.gguf"
    measure = ["-m", out, "-f", tmp_path / "text.txt", "-o", imatrix, "-c", "64", "-b", "64", "--chunks", "4"]
    subprocess.run([toolchain.tool("llama-imatrix"), *measure], check=True, capture_output=True)
    subprocess.run(
        [toolchain.tool("llama-quantize"), "--imatrix", imatrix, out, quantised, "Q4_K_M"], check=True, capture_output=True
    )
    assert any(tensor.type_name == "Q4_K" for tensor in read_header(quantised).tensors)


@pytest.mark.convert
def test_the_real_converter_explains_itself(run: Convert, converter: Path, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(EngineError, match="NobodyForCausalLM"):
        run(converter)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match="tokenizer"):
        run(converter)
