"""Converts a Hugging Face directory to one GGUF with llama.cpp's converter in a child process, with checks before and after."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from imatrix_runner.environment import ChildNeeds
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, ToolchainError, from_os_error
from imatrix_runner.events import Finished, Progress, Saved, Sink, Started
from imatrix_runner.extras import CONVERT
from imatrix_runner.files import human_bytes, part_path, publish, require_space
from imatrix_runner.models.converter_messages import explain_conversion
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.model import open_gguf
from imatrix_runner.models.safetensors_file import SafetensorsWeights, check_safetensors, read_model_json
from imatrix_runner.process import Command, Outcome, Runner, Stream

__all__ = ["STEP", "check_safetensors", "convert", "refuse_code", "resolve_outtype"]

OutType = Literal["auto", "f16", "bf16", "f32"]
Concrete = Literal["f16", "bf16", "f32"]

STEP = "convert"
"""The step that conversion events carry."""

_BY_DTYPE: dict[str, Concrete] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_BY_CONFIG: dict[str, Concrete] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_WIDTH = {"f32": 4, "f16": 2, "bf16": 2}
_PERCENT = re.compile(r"Writing:\s+(\d{1,3})%")
_PROJECTOR_PART = re.compile(r"vision|visual|audio|mm_|multi_modal|projector|merger", re.IGNORECASE)
_VOCABULARY_BYTES = 64 << 20  # header and vocabulary: 10 to 20 MB for the largest known


def resolve_outtype(directory: Path) -> Concrete:
    """The type that keeps a checkpoint as published: the one in which most of its weights are stored.

    The safetensors headers decide, because some configurations are wrong. The converter unpacks 8-bit and packed formats; for
    those ``dtype`` (or ``torch_dtype``) of config.json decides, and without it BF16.
    """
    return _stored_type(directory, check_safetensors(directory))


def refuse_code(directory: Path) -> None:
    """Raise :class:`InvalidDataError` if converting the directory could execute Python code that came with the model."""
    carried = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.py"))
    mapped = [name for name in ("config.json", "tokenizer_config.json") if "auto_map" in _json(directory / name)]
    if carried or mapped:
        found = f"it contains {carried[0]}" if carried else f"{mapped[0]} has an auto_map"
        raise InvalidDataError(
            f"{directory} contains its own code",
            f"{found}, and the converter would execute that code with your rights",
            "Read the code; if you trust it, run the same command with --trust-remote-code.",
        )


def convert(
    directory: Path,
    out: Path,
    *,
    converter: Path,
    outtype: OutType,
    mmproj: bool,
    trust_remote_code: bool,
    runner: Runner,
    sink: Sink,
    log: Path,
    name: str | None = None,
    conclude: Callable[[Path, Path], None] = publish,
) -> Path:
    """Convert a checkpoint to the GGUF ``out`` (the projector alone with ``mmproj``) and return ``out``.

    ``name`` becomes ``general.name``; without it the converter uses the directory's name, which in a hub cache is a commit. The
    file is written under a temporary name, verified, and renamed by ``conclude(part, out)``. Raises :class:`InvalidDataError`
    for a checkpoint that cannot be converted, :class:`ToolchainError` for missing packages, :class:`NoSpaceError`, and
    :class:`EngineError` for a failure.
    """
    _require_tools(converter)
    if not trust_remote_code:
        refuse_code(directory)
    weights = check_safetensors(directory)
    kind = _stored_type(directory, weights) if outtype == "auto" else outtype
    require_space(out, _estimate(weights, kind, mmproj), f"the conversion of {directory.name}")
    part = part_path(out).with_name(
        part_path(out).name.replace("{", "_").replace("}", "_")
    )  # braces: the converter's templates
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, "preparing the conversion", out.parent) from error
    sink(Started(STEP, f"Converting {name or directory.name} to {kind.upper()}", 100.0, "%"))
    try:
        seconds = _run(_command(directory, part, converter, kind, mmproj, trust_remote_code, name), runner, sink, log)
        _verify(part, mmproj)
        conclude(part, out)
    except RunnerError as error:
        sink(Finished(STEP, "failed", str(error)))
        raise
    finally:
        part.unlink(missing_ok=True)
    size = out.stat().st_size
    sink(Finished(STEP, "done", f"{human_bytes(size)} in {kind.upper()}", seconds))
    sink(Saved(str(out), "projector" if mmproj else "model", size))
    return out


def _require_tools(converter: Path) -> None:
    if not converter.is_file():
        raise ToolchainError(
            "The converter is missing",
            f"there is no {converter}",
            "Build a toolchain that includes it with: imatrix-runner tools build",
        )
    CONVERT.require("Converting a Hugging Face model")


def _command(
    directory: Path, part: Path, converter: Path, kind: Concrete, mmproj: bool, trust_remote_code: bool, name: str | None
) -> Command:
    argv = [sys.executable, str(converter), str(directory.absolute()), "--outfile", str(part.absolute()), "--outtype", kind]
    argv += ["--model-name", name] if name else []
    argv += ["--mmproj"] if mmproj else []
    # No token: the model's own code may run in the child, and nothing that needs a token is fetched.
    env = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    needs = ChildNeeds.COMPUTE | ChildNeeds.HUB
    if trust_remote_code:
        needs |= ChildNeeds.NETWORK
    else:
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded, in particular no code
    return Command(tuple(argv), env=env, needs=needs)


def _run(command: Command, runner: Runner, sink: Sink, log: Path) -> float:
    outcome = runner.run(command, log=log, on_text=_progress(sink))
    if not outcome.ok:
        raise _failure(outcome, log)
    return outcome.seconds


def _progress(sink: Sink) -> Callable[[Stream, str], None]:
    last = -1

    def report(_stream: Stream, text: str) -> None:
        nonlocal last
        for match in _PERCENT.finditer(text):
            if int(match[1]) > last:
                last = int(match[1])
                sink(Progress(STEP, float(last), 100.0))

    return report


def _verify(part: Path, mmproj: bool) -> None:
    if not mmproj:
        open_gguf(part, allow_requantize=True)
    elif read_header(part).text("general.architecture") != "clip":
        raise InvalidDataError(
            "The converter wrote no projector", "the file's architecture is not 'clip'", "Convert the model without --mmproj."
        )


def _stored_type(directory: Path, weights: SafetensorsWeights) -> Concrete:
    stored = _BY_DTYPE.get(weights.main_dtype)
    if stored is not None:
        return stored
    config = _json(directory / "config.json")
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if (kind := _BY_CONFIG.get(str(place.get(key)))) is not None:
                return kind
    return "bf16"


def _estimate(weights: SafetensorsWeights, kind: Concrete, mmproj: bool) -> int:
    """Upper estimate of the GGUF's size in bytes."""
    parts = [tensor for tensor in weights.tensors if not mmproj or _PROJECTOR_PART.search(tensor.name)]
    width = {True: _WIDTH[kind], False: _WIDTH["f32"]}
    return _VOCABULARY_BYTES + sum(tensor.n_elements * width[len(tensor.shape) > 1] for tensor in parts)


def _json(path: Path) -> dict[str, Any]:
    return read_model_json(path) if path.is_file() else {}


def _failure(outcome: Outcome, log: Path) -> RunnerError:
    """The error for a failed conversion, explained from the end of its output; the whole output is in ``log``."""
    if outcome.out_of_memory or outcome.hung:
        todo = f"Close other programs or use a machine with more memory, then run the same command again; log: {log}"
        return EngineError("The conversion did not finish", outcome.ending(), todo)
    return explain_conversion(outcome.tail, outcome.ending(), str(log))
