"""Task job: a model computes the requests of tasks, in batches; a stop or a kill keeps complete batches.

Texts whose likelihood is wanted are read first, then the generated ones are written. Which requests share a batch follows from
the requests and the options alone, and an interrupted job computes the same batches again, so its outcomes are the same to the
last bit.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.task_outcomes import OutcomesFile
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.protocol import Send, TasksAnswered
from imatrix_runner.engines.task_jobs import TaskJob, TaskOutcome, TaskRequest
from imatrix_runner.engines.worker.abi_check import check
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.llama_context import LlamaContext, open_context, open_weights
from imatrix_runner.engines.worker.nonfinite import refuse
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.engines.worker.tasks.readings import (
    Reading,
    ReadingBatch,
    ReadTarget,
    cut_pair,
    reading_batches,
    rolling_readings,
    scored_pair,
    shared,
)
from imatrix_runner.engines.worker.tasks.writing import WritingBatch, Written, write_batch, writing_batches
from imatrix_runner.engines.worker.tokens import Tokens, tokenize_bytes
from imatrix_runner.events import Progress


class _Shape(Protocol):
    """A batch's contexts: tokens of each, and how many."""

    @property
    def n_ctx(self) -> int: ...

    @property
    def sequences(self) -> int: ...


BatchT = TypeVar("BatchT", bound=_Shape)


def compute_tasks(job: TaskJob, send: Send) -> None:
    """Compute every request; after a stop the same job continues from the complete batches."""
    began = time.monotonic()
    library, stop = load(), StdinStop()
    check(library)
    requests = [msgspec.json.decode(line, type=TaskRequest) for line in job.requests.read_bytes().splitlines()]
    with open_weights(library, job.model, job.options) as model, closing(OutcomesFile(job.out, job.fingerprint)) as file:
        reader = _Reader.of(library, model, job, stop)
        readings, prompts = reader.readings(requests), reader.prompts(requests)
        reading = reading_batches([len(each.tokens) for each in readings], job.options.n_ubatch)
        writing = writing_batches([(len(each.tokens), each.n_predict) for each in prompts])
        loaded = time.monotonic()
        left = reading[file.groups :]
        for context, batch in _in_contexts(library, model, job, left):
            if stop.requested:
                break
            file.append(reader.read(context, batch, readings))
            send(Progress(job.step, min(file.items, len(requests)), len(requests)))
        for context, group in _in_contexts(library, model, job, writing[max(0, file.groups - len(reading)) :]):
            if stop.requested:
                break
            file.append(reader.write(context, group, prompts))
            send(Progress(job.step, min(file.items, len(requests)), len(requests)))
        done = file.groups == len(reading) + len(writing)
        n_done = len(requests) if done else min(file.items, len(requests))
        send(TasksAnswered(n_done, done, time.monotonic() - loaded, loaded - began))


def _in_contexts(
    library: Library, model: Any, job: TaskJob, batches: Sequence[BatchT]
) -> Iterator[tuple[LlamaContext, BatchT]]:
    with closing(_contexts(library, model, job.model, job.options, batches)) as waiting:
        yield from waiting


def _contexts(
    library: Library, model: Any, path: Path, options: CollectOptions, batches: Sequence[BatchT]
) -> Generator[tuple[LlamaContext, BatchT], None, None]:
    """Yield each batch with a context that has its sequences; neighbours of the same shape share one."""
    for (n_ctx, sequences), waiting in groupby(batches, key=lambda batch: (batch.n_ctx, batch.sequences)):
        shaped = replace(options, n_ctx=n_ctx, n_batch=sequences * n_ctx)
        with open_context(library, model, path, shaped, None) as context:
            for batch in waiting:
                yield context, batch


@dataclass(frozen=True)
class _Reader:
    """A loaded model. ``prefix``: the token that a text without context begins with; ``most``: tokens of its context."""

    library: Library
    model: Path
    vocab: Any
    bos: int
    prefix: int
    most: int
    stop: StdinStop

    @classmethod
    def of(cls, library: Library, model: Any, job: TaskJob, stop: StdinStop) -> _Reader:
        llama = library.llama
        vocab = llama.llama_model_get_vocab(model)
        bos, eos = llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab)
        prefix = bos if bos >= 0 else eos
        if prefix < 0:
            raise Refusal.invalid(
                f"{job.model.name} cannot compute tasks",
                "its vocabulary has neither a token that begins a text nor one that ends it",
                "Convert the model again: its tokenizer files name them.",
            )
        return cls(library, job.model, vocab, bos, prefix, llama.llama_model_n_ctx_train(model), stop)

    def encode(self, text: str, special: bool) -> Tokens:
        """int32 [n]; a BOS that the text writes and the vocabulary adds occurs once."""
        tokens = tokenize_bytes(self.library, self.vocab, text.encode(), add_special=special, parse_special=True)
        twice = special and len(tokens) > 1 and tokens[0] == tokens[1] == self.bos
        return tokens[1:] if twice else tokens

    def readings(self, requests: Sequence[TaskRequest]) -> list[Reading]:
        """What is read for the likelihoods, each distinct input once, from the shortest."""
        found: list[Reading] = []
        for number, request in enumerate(requests):
            if request.kind == "loglikelihood":
                context, continuation = scored_pair(request.context, request.continuation, self.encode, self.prefix)
                found.append(cut_pair(number, context, continuation, self.most))
            elif request.kind == "rolling":
                found += rolling_readings(number, self.encode(request.context, False), self.prefix, self.most)
        return shared(found)

    def prompts(self, requests: Sequence[TaskRequest]) -> list[Written]:
        """What is continued, cut on the left to leave room for the answer."""
        found = []
        for number, request in enumerate(requests):
            if request.kind == "generate":
                n_predict = max(1, min(request.n_predict, self.most // 2))
                tokens = self.encode(request.context, True)
                tokens = tokens if len(tokens) else np.array([self.prefix], np.int32)
                kept = tokens[-(self.most - n_predict) :]
                found.append(Written(number, kept, request.until, n_predict, len(tokens) - len(kept)))
        return found

    def read(self, context: LlamaContext, batch: ReadingBatch, readings: Sequence[Reading]) -> list[TaskOutcome]:
        """The outcomes of a batch of readings."""
        members = [readings[number] for number in batch.members]
        context.forget()
        if len(members) * batch.length <= context.options.n_ubatch:
            return self._read_together(context, members, batch.length)
        (alone,) = members
        return self._read_alone(context, alone)

    def _read_together(self, context: LlamaContext, members: Sequence[Reading], length: int) -> list[TaskOutcome]:
        """Readings as sequences of one micro-batch, padded at their ends, where nothing before depends on it."""
        count = len(members)
        tokens, wanted = np.empty((count, length), np.int32), np.zeros((count, length), np.bool_)
        for row, reading in enumerate(members):
            tokens[row, : len(reading.tokens)] = reading.tokens
            tokens[row, len(reading.tokens) :] = reading.tokens[-1]
            wanted[row, reading.first : len(reading.tokens)] = True
        positions = np.tile(np.arange(length, dtype=np.int32), count)
        context.feed(tokens.ravel(), positions, np.repeat(np.arange(count), length), wanted.ravel())
        logits = context.logits(int(wanted.sum()))
        outcomes, at = [], 0
        for reading in members:
            rows = logits[at : at + len(reading.tokens) - reading.first]
            at += len(rows)
            outcomes += [self._scored(target, rows, target.tokens) for target in reading.targets]
        return outcomes

    def _read_alone(self, context: LlamaContext, reading: Reading) -> list[TaskOutcome]:
        """A reading longer than a micro-batch, in several of about equal length."""
        positions = np.arange(len(reading.tokens), dtype=np.int32)
        sums = [self._scored(each, np.empty((0, 0), np.float32), each.tokens[:0]) for each in reading.targets]
        for part in np.array_split(positions, -(-len(positions) // context.options.n_ubatch)):
            wanted = part >= reading.first
            context.feed(reading.tokens[part], part, np.zeros(len(part), np.int64), wanted)
            if not wanted.any():
                continue
            rows, begin = context.logits(int(wanted.sum())), int(part[wanted][0]) - reading.first
            for at, target in enumerate(reading.targets):
                scored = self._scored(target, rows, target.tokens[begin : begin + len(rows)])
                sums[at] = replace(
                    sums[at],
                    value=sums[at].value + scored.value,
                    greedy=sums[at].greedy and scored.greedy,
                    n_tokens=sums[at].n_tokens + scored.n_tokens,
                )
        return sums

    def _scored(self, target: ReadTarget, rows: npt.NDArray[np.float32], tokens: Tokens) -> TaskOutcome:
        """The outcome of ``tokens`` int32 [n], some of a target's, which ``rows`` of logits float32 [n, n_vocab] predict."""
        value, greedy = 0.0, True
        for row, token in zip(rows[: len(tokens)], tokens.tolist(), strict=True):
            best = int(row.argmax())  # the first of equals
            if not (np.isfinite(row[best]) and np.isfinite(row[token])):
                raise refuse(self.library, self.model, f"its logits for request {target.request + 1}", None, self.stop)
            value += float(row[token]) - float(row[best]) - float(np.log(np.exp(row - row[best]).sum(dtype=np.float64)))
            greedy = greedy and best == token
        return TaskOutcome(target.request, value, greedy, "", len(tokens), False, target.dropped, target.part, target.parts)

    def write(self, context: LlamaContext, batch: WritingBatch, prompts: Sequence[Written]) -> list[TaskOutcome]:
        """The outcomes of a batch of generated texts."""

        def not_a_number(request: int) -> Refusal:
            return refuse(self.library, self.model, f"its logits for request {request + 1}", None, self.stop)

        return write_batch(self.library, self.vocab, context, batch, prompts, not_a_number)
