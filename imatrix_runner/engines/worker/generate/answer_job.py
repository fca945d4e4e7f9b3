"""Answer job: a model's answers to prompts, with the most likely token, or drawn with a seed.

Groups of prompts (:mod:`~imatrix_runner.engines.worker.batching`) are answered one after another; a stop or a kill keeps
complete groups. Within a group every prompt is read by itself, then all sequences continue in parallel, one token each. A batch
always has a token for every sequence, even if answers have ended or sequences have no prompt. So no answer depends on the
others, as long as llama.cpp computes each row of a batch independently of the other rows, which it does on CPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from imatrix_runner.engines.files.completions import CompletionsFile
from imatrix_runner.engines.measures import AnswerJob, Completion, Prompt, Sampling
from imatrix_runner.engines.protocol import Answered, Send
from imatrix_runner.engines.worker.abi_check import check
from imatrix_runner.engines.worker.batching import Group, groups
from imatrix_runner.engines.worker.generate.sampler import Sampler
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.llama_context import LlamaContext, open_context, open_weights
from imatrix_runner.engines.worker.nonfinite import refuse
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.engines.worker.tokens import Tokens, token_bytes, tokenize_bytes
from imatrix_runner.events import Progress

_LONGEST = 1 << 20
"""Most bytes of an answer's text: an untrusted vocabulary may have tokens of any length."""


def answer_prompts(job: AnswerJob, send: Send) -> None:
    """Answer every prompt; after a stop the same job continues from the complete groups."""
    began = time.monotonic()
    library, stop = load(), StdinStop()
    check(library)
    prompts = [msgspec.json.decode(line, type=Prompt) for line in job.prompts.read_bytes().splitlines()]
    with open_weights(library, job.model, job.options) as model:
        writer = _Writer.of(library, model, job, stop)
        tokens = [writer.tokens(prompt) for prompt in prompts]
        writer.refuse_unfit(tokens)
        plan = groups([len(each) + job.n_predict for each in tokens])
        with closing(CompletionsFile(job.out, job.fingerprint)) as file:
            loaded = time.monotonic()
            with closing(_contexts(library, model, job, plan[file.groups :])) as waiting:
                for context, group in waiting:
                    if stop.requested:
                        break
                    before = file.prompts

                    def on_progress(done: int, before: int = before) -> None:
                        send(Progress(job.step, before + done, len(prompts)))

                    file.append(writer.answer(context, group, tokens, on_progress))
                    on_progress(len(group.members))
            send(Answered(file.prompts, file.prompts == len(prompts), time.monotonic() - loaded, loaded - began))


def _contexts(
    library: Library, model: Any, job: AnswerJob, plan: Sequence[Group]
) -> Generator[tuple[LlamaContext, Group], None, None]:
    """Yield each group with a context that has its sequences; groups of the same shape share one."""
    for (n_ctx, sequences), waiting in groupby(plan, key=lambda group: (group.n_ctx, group.sequences)):
        options = replace(job.options, n_ctx=n_ctx, n_batch=sequences * n_ctx)
        with open_context(library, model, job.model, options, None) as context:
            for group in waiting:
                yield context, group


@dataclass(frozen=True)
class _Writer:
    """A loaded model that answers in ``n_predict`` tokens at most; ``bos`` is -1 where the vocabulary adds none."""

    library: Library
    model: Path
    vocab: Any
    bos: int
    n_ctx_train: int
    n_predict: int
    stop: StdinStop
    sampling: Sampling | None

    @classmethod
    def of(cls, library: Library, model: Any, job: AnswerJob, stop: StdinStop) -> _Writer:
        llama = library.llama
        vocab = llama.llama_model_get_vocab(model)
        bos = llama.llama_vocab_bos(vocab) if llama.llama_vocab_get_add_bos(vocab) else -1
        return cls(library, job.model, vocab, bos, llama.llama_model_n_ctx_train(model), job.n_predict, stop, job.sampling)

    def tokens(self, prompt: Prompt) -> Tokens:
        """int32 [n], as in llama.cpp's own chat: a BOS that the template writes and the vocabulary adds occurs once."""
        data = prompt.text.encode()
        tokens = tokenize_bytes(self.library, self.vocab, data, add_special=True, parse_special=prompt.parse_special)
        twice = prompt.parse_special and len(tokens) > 1 and tokens[0] == tokens[1] == self.bos
        return tokens[1:] if twice else tokens

    def refuse_unfit(self, prompts: Sequence[Tokens]) -> None:
        """Raise :class:`Refusal` for an empty prompt or one that is too long."""
        for number, tokens in enumerate(prompts, 1):
            if not len(tokens):
                raise Refusal.invalid(
                    f"Prompt {number} is empty", f"for {self.model.name} it has no tokens", "Remove it from the file."
                )
            if len(tokens) + self.n_predict > self.n_ctx_train:
                raise Refusal.invalid(
                    f"Prompt {number} is too long for {self.model.name}",
                    f"it has {len(tokens)} tokens, the answer may have {self.n_predict}, "
                    f"and the model was trained with a context of {self.n_ctx_train}",
                    "Shorten or remove it, or ask for shorter answers with --predict.",
                )

    def answer(
        self, context: LlamaContext, group: Group, prompts: Sequence[Tokens], on_progress: Callable[[int], None]
    ) -> list[Completion]:
        """The answers of a group; ``on_progress`` gets the number of prompts done, estimated from the tokens."""
        present = [prompts[number] for number in group.members]
        empty = [present[0][:1]] * (group.sequences - len(present))
        answers, ends = self._write(context, [*present, *empty], group.members, on_progress)
        return [
            Completion(number, len(tokens), tuple(ids), len(end) > 0, self._text(ids), self._text(end))
            for number, tokens, ids, end in zip(group.members, present, answers, map(_at_most_one, ends), strict=True)
        ]

    def _write(
        self, context: LlamaContext, prompts: Sequence[Tokens], members: Sequence[int], on_progress: Callable[[int], None]
    ) -> tuple[list[list[int]], list[int | None]]:
        """The tokens of each member's answer, and the token with which the model ended it; None if it did not."""
        is_end = self.library.llama.llama_vocab_is_eog
        context.forget()
        for sequence, prompt in enumerate(prompts):
            read_prompt(context, sequence, prompt[:-1])
        sequences, outputs = np.arange(len(prompts)), np.ones(len(prompts), np.bool_)
        latest = np.array([prompt[-1] for prompt in prompts], np.int32)
        ends = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
        answers: list[list[int]] = [[] for _ in members]
        ended: list[int | None] = [None] * len(members)
        reported = 0
        samplers = [Sampler(self.sampling, member) for member in members] if self.sampling is not None else []
        for step in range(self.n_predict):
            context.feed(latest, ends + np.int32(step), sequences, outputs)
            logits = context.logits(len(prompts))
            latest = logits.argmax(axis=1).astype(np.int32)  # the first of equals
            for sequence in (sequence for sequence, end in enumerate(ended) if end is None):
                if not np.isfinite(logits[sequence, latest[sequence]]):
                    raise self._not_a_number(members[sequence])
                if samplers:
                    latest[sequence] = samplers[sequence].draw(logits[sequence])
                if is_end(self.vocab, int(latest[sequence])):
                    ended[sequence] = int(latest[sequence])
                else:
                    answers[sequence].append(int(latest[sequence]))
            n_ended = sum(end is not None for end in ended)
            if n_ended == len(members):
                break
            done = max(n_ended, len(members) * step // self.n_predict)
            if done > reported:
                on_progress(reported := done)
        return answers, ended

    def _text(self, ids: Sequence[int]) -> str:
        """The tokens' text, with control tokens written out and invalid UTF-8 replaced."""
        data = bytearray()
        for token in ids:
            if len(data) > _LONGEST:
                break
            data += token_bytes(self.library, self.vocab, token)
        return data[:_LONGEST].decode("utf-8", "replace")

    def _not_a_number(self, prompt: int) -> Refusal:
        return refuse(self.library, self.model, f"its logits for prompt {prompt + 1}", None, self.stop)


def _at_most_one(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


def read_prompt(context: LlamaContext, sequence: int, tokens: Tokens) -> None:
    """Compute ``tokens`` from a sequence's beginning without outputs, in micro-batches of about equal length."""
    if not len(tokens):
        return
    positions = np.arange(len(tokens), dtype=np.int32)
    for part in np.array_split(positions, -(-len(tokens) // context.options.n_ubatch)):
        context.feed(tokens[part], part, np.full(len(part), sequence), np.zeros(len(part), np.bool_))
