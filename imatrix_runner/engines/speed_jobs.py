"""The job that measures how fast a file runs on this machine, and its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.files import encode_json


@dataclass(frozen=True)
class SpeedJob:
    """Time ``model`` as llama-bench does: a prompt of ``n_prompt`` random tokens, and ``n_gen`` random tokens one after
    another, each ``repetitions`` times after a warm-up run, with ``depth`` tokens in the context before. 0 leaves a test out.

    ``options``: how it is computed; those about chunks have no effect.
    """

    step: str
    model: Path
    n_prompt: int
    n_gen: int
    depth: int
    repetitions: int
    options: CollectOptions
    log: Path | None


_WITHOUT_EFFECT = ("n_ctx", "parse_special", "process_output", "ppl", "extra")


def timing_words(options: CollectOptions) -> str:
    """The options that a speed depends on, as JSON: all that are not known to have no effect, also those that change no
    number."""
    used = {name: value for name, value in asdict(options).items() if name not in _WITHOUT_EFFECT}
    return encode_json(used).decode()


@dataclass(frozen=True)
class MemoryBuffer:
    """A buffer that llama.cpp reports: ``kind`` (``model``, ``KV``, ``RS``, ``compute``, ``output``), the ``device``
    (``CPU_Mapped``, ``CUDA0``), and bytes, as exact as llama.cpp's hundredths of a MiB."""

    kind: str
    device: str
    n_bytes: int


@dataclass(frozen=True)
class TimedRuns:
    """What a :class:`SpeedJob` found: tokens per second of every repetition, for the prompt and for generation; the buffers of
    a context for the longer of both tests; the number of threads."""

    prompt: tuple[float, ...]
    generation: tuple[float, ...]
    buffers: tuple[MemoryBuffer, ...]
    threads: int
