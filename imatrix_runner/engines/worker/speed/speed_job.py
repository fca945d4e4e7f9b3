"""Speed job: tokens per second of a prompt and of generation, with llama-bench's definitions.

As in llama-bench (tools/llama-bench): random tokens, nothing is sampled, each test has a context of its own that just holds it,
the memory is cleared before each repetition, a prompt is computed in batches of which only the last token is an output, and
generation waits for each token. The tokens of the depth are computed once for a test; then their state is restored.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from imatrix_runner.engines.protocol import Send, Timed
from imatrix_runner.engines.speed_jobs import MemoryBuffer, SpeedJob, TimedRuns
from imatrix_runner.engines.worker.abi_check import check
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.llama_context import LlamaContext, open_context, open_weights, usable_cpus
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.engines.worker.tokens import Tokens
from imatrix_runner.events import Progress

_SEED = 1
_BUFFER = re.compile(r"([\w.\-\[\]]{1,60}) +(?:\w+ )?(model|KV|RS|compute|output) (?:state )?buffer size = +([\d.]{1,20}) MiB")


def measure_speed(job: SpeedJob, send: Send) -> None:
    """Run both tests; after a stop what is done is sent, and the reply says that it is not all."""
    library, stop = load(), StdinStop()
    check(library)
    total = job.repetitions * (bool(job.n_prompt) + bool(job.n_gen))
    done = 0

    def on_repetition() -> bool:
        nonlocal done
        done += 1
        send(Progress(job.step, done, total))
        return not stop.requested

    with _said(library) as lines, open_weights(library, job.model, job.options) as model:
        before = len(lines)
        weights = _buffers(lines)
        prompt, context_buffers = _test(library, model, job, job.n_prompt, _read_prompt, lines, before, on_repetition)
        before = len(lines)
        generated, others = _test(library, model, job, job.n_gen, _generate, lines, before, on_repetition)
    longer = context_buffers if job.n_prompt >= job.n_gen else others
    threads = job.options.threads or usable_cpus()
    runs = TimedRuns(prompt, generated, (*weights, *longer), threads)
    send(Timed(runs, done == total))


@dataclass(frozen=True)
class _Tested:
    """An open context with a batch for ``n_batch`` tokens, and where random tokens come from."""

    context: LlamaContext
    n_batch: int
    random: np.random.Generator

    def tokens(self, n: int, *, first: bool) -> Tokens:
        """Random tokens, the first of a sequence as the vocabulary begins one."""
        tokens = self.random.integers(0, self.context.n_vocab, n).astype(np.int32)
        if first and self.context.add_bos:
            tokens[0] = self.context.bos
        return tokens

    def feed(self, tokens: Tokens, position: int) -> None:
        """Compute tokens from a position on; the last one is an output."""
        n = len(tokens)
        outputs = np.zeros(n, np.bool_)
        outputs[-1] = True
        self.context.feed(tokens, np.arange(position, position + n, dtype=np.int32), np.zeros(n, np.int64), outputs)

    def read(self, n: int, position: int) -> None:
        for at in range(0, n, self.n_batch):
            self.feed(self.tokens(min(self.n_batch, n - at), first=at + position == 0), position + at)


def _read_prompt(tested: _Tested, position: int, n: int) -> None:
    tested.read(n, position)


def _generate(tested: _Tested, position: int, n: int) -> None:
    for at in range(n):
        tested.feed(tested.tokens(1, first=at == 0), position + at)


def _test(
    library: Library,
    model: Any,
    job: SpeedJob,
    n: int,
    run: Callable[[_Tested, int, int], None],
    lines: list[str],
    before: int,
    on_repetition: Callable[[], bool],
) -> tuple[tuple[float, ...], tuple[MemoryBuffer, ...]]:
    """Tokens per second of every repetition of a test of ``n`` tokens, and the buffers of its context; ``lines`` from number
    ``before`` on are those that llama.cpp says about it."""
    if not n:
        return (), ()
    n_ctx = job.depth + n
    options = replace(job.options, n_ctx=n_ctx, n_batch=min(job.options.n_batch, n_ctx))
    speeds: list[float] = []
    with open_context(library, model, job.model, options, None) as context, _batch(library, options.n_batch) as batch:
        buffers = _buffers(lines[before:])
        tested = _Tested(replace(context, batch=batch), options.n_batch, np.random.default_rng(_SEED))
        run(tested, 0, n if run is _read_prompt else 1)
        state: bytes | None = None
        for _ in range(job.repetitions):
            context.forget()
            if job.depth:
                state = _fill(library, tested, job.depth, state)
            began = time.perf_counter()
            run(tested, job.depth, n)
            speeds.append(n / (time.perf_counter() - began))
            if not on_repetition():
                break
    return tuple(speeds), buffers


def _fill(library: Library, tested: _Tested, depth: int, state: Any) -> Any:
    """Have the context hold ``depth`` tokens, restored from ``state`` if it is given; returns their state."""
    llama, pointer = library.llama, tested.context.pointer
    if state is not None and llama.llama_state_seq_set_data(pointer, state, len(state), 0):
        return state
    tested.context.forget()
    tested.read(depth, 0)
    size = llama.llama_state_seq_get_size(pointer, 0)
    kept = (ctypes.c_uint8 * size)()
    if llama.llama_state_seq_get_data(pointer, kept, size, 0) != size:
        raise Refusal.failed("The state of a context could not be kept", "llama.cpp wrote less than it announced")
    return kept


@contextmanager
def _batch(library: Library, n_tokens: int) -> Iterator[Any]:
    batch = library.llama.llama_batch_init(n_tokens, 0, 1)
    try:
        yield batch
    finally:
        library.llama.llama_batch_free(batch)


@contextmanager
def _said(library: Library) -> Iterator[list[str]]:
    """The pieces of llama.cpp's messages as they come; they go to stderr as usual."""
    lines: list[str] = []

    def on_message(_level: int, text: bytes, _data: Any) -> None:
        words = text.decode("utf-8", "replace")
        lines.append(words)
        sys.stderr.write(words)

    callback = library.llama.llama_log_callback(on_message)
    library.llama.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        library.llama.llama_log_set(library.llama.llama_log_callback(), None)
        sys.stderr.flush()


def _buffers(lines: list[str]) -> tuple[MemoryBuffer, ...]:
    """The buffers that llama.cpp's messages name, those of one kind on one device added up."""
    found: dict[tuple[str, str], int] = {}
    for device, kind, size in _BUFFER.findall("".join(lines)):
        found[kind, device] = found.get((kind, device), 0) + round(float(size) * (1 << 20))
    return tuple(MemoryBuffer(kind, device, n_bytes) for (kind, device), n_bytes in found.items())
