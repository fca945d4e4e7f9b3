"""The worker's third job: a model's own answers to prompts, always the most likely token.

Groups of prompts (:mod:`.seating`) are answered one after another; a group is what a stop or a kill leaves behind whole. In it
every prompt is read alone, then all go on side by side, one token each: always as many tokens as there are seats, also when
some answers have ended or seats were empty from the beginning. No answer depends on the others' then, as far as llama.cpp
computes a row of a batch without regard to the rows beside it, which it does on processors.
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

from imatrix_runner.engines.embedded.completions import CompletionsFile
from imatrix_runner.engines.embedded.library import Library, load
from imatrix_runner.engines.embedded.nonfinite import refuse
from imatrix_runner.engines.embedded.proof import check
from imatrix_runner.engines.embedded.protocol import Answer, Answered, Generate
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.engines.embedded.seating import Group, groups
from imatrix_runner.engines.embedded.session import Session, open_context, open_weights
from imatrix_runner.engines.embedded.stdin import Stop
from imatrix_runner.engines.embedded.tokens import Tokens, piece, tokenize_bytes
from imatrix_runner.engines.measures import Completion, Prompt
from imatrix_runner.events import Progress

_LONGEST = 1 << 20
"""Bytes of an answer's text: a token may stand for whatever a stranger wrote into the vocabulary."""


def answer(request: Generate, tell: Callable[[Answer], None]) -> None:
    """Answer every prompt; at a stop what is whole stays, and the same request continues."""
    began = time.monotonic()
    library, stop = load(), Stop()
    check(library)
    prompts = [msgspec.json.decode(line, type=Prompt) for line in request.prompts.read_bytes().splitlines()]
    with open_weights(library, request.model, request.options) as model:
        writer = _Writer.of(library, model, request, stop)
        tokens = [writer.tokens(prompt) for prompt in prompts]
        writer.refuse_unfit(tokens)
        plan = groups([len(each) + request.n_predict for each in tokens])
        with closing(CompletionsFile(request.out, request.fingerprint)) as file:
            loaded = time.monotonic()
            with closing(_seated(library, model, request, plan[file.groups :])) as waiting:
                for session, group in waiting:
                    if stop.requested:
                        break
                    before = file.prompts

                    def hear(done: int, before: int = before) -> None:
                        tell(Progress(request.step, before + done, len(prompts)))

                    file.append(writer.answer(session, group, tokens, hear))
                    hear(len(group.members))
            tell(Answered(file.prompts, file.prompts == len(prompts), time.monotonic() - loaded, loaded - began))


def _seated(
    library: Library, model: Any, request: Generate, plan: Sequence[Group]
) -> Generator[tuple[Session, Group], None, None]:
    """Each group and a context with its seats; groups of the same kind share one."""
    for (n_ctx, seats), waiting in groupby(plan, key=lambda group: (group.n_ctx, group.seats)):
        options = replace(request.options, n_ctx=n_ctx, n_batch=seats * n_ctx)
        with open_context(library, model, request.model, options, None) as session:
            for group in waiting:
                yield session, group


@dataclass(frozen=True)
class _Writer:
    """A loaded model that answers in ``n_predict`` tokens at most; ``bos`` is -1 where the vocabulary adds none."""

    library: Library
    model: Path
    vocab: Any
    bos: int
    n_ctx_train: int
    n_predict: int
    stop: Stop

    @classmethod
    def of(cls, library: Library, model: Any, request: Generate, stop: Stop) -> _Writer:
        llama = library.llama
        vocab = llama.llama_model_get_vocab(model)
        bos = llama.llama_vocab_bos(vocab) if llama.llama_vocab_get_add_bos(vocab) else -1
        return cls(library, request.model, vocab, bos, llama.llama_model_n_ctx_train(model), request.n_predict, stop)

    def tokens(self, prompt: Prompt) -> Tokens:
        """int32 [n], as llama.cpp's own chat reads it: a template may write the BOS that the vocabulary adds."""
        data = prompt.text.encode()
        tokens = tokenize_bytes(self.library, self.vocab, data, add_special=True, parse_special=prompt.parse_special)
        twice = prompt.parse_special and len(tokens) > 1 and tokens[0] == tokens[1] == self.bos
        return tokens[1:] if twice else tokens

    def refuse_unfit(self, prompts: Sequence[Tokens]) -> None:
        """Before anything is computed."""
        for number, tokens in enumerate(prompts, 1):
            if not len(tokens):
                raise Refusal.invalid(
                    f"Prompt {number} is empty", f"for {self.model.name} it has no tokens", "Take it out of the file."
                )
            if len(tokens) + self.n_predict > self.n_ctx_train:
                raise Refusal.invalid(
                    f"Prompt {number} is too long for {self.model.name}",
                    f"it has {len(tokens)} tokens, the answer may have {self.n_predict}, "
                    f"and the model was made for {self.n_ctx_train} together",
                    "Shorten or remove it, or ask for shorter answers with --predict.",
                )

    def answer(
        self, session: Session, group: Group, prompts: Sequence[Tokens], hear: Callable[[int], None]
    ) -> list[Completion]:
        """The answers of a group; ``hear`` is told how many prompts' worth is done."""
        seated = [prompts[number] for number in group.members]
        empty = [seated[0][:1]] * (group.seats - len(seated))
        answers, ended = self._write(session, [*seated, *empty], group.members, hear)
        return [
            Completion(number, len(tokens), tuple(ids), end, self._text(ids))
            for number, tokens, ids, end in zip(group.members, seated, answers, ended, strict=True)
        ]

    def _write(
        self, session: Session, prompts: Sequence[Tokens], members: Sequence[int], hear: Callable[[int], None]
    ) -> tuple[list[list[int]], list[bool]]:
        """The tokens of each member's answer, and whether it ended by itself."""
        is_end = self.library.llama.llama_vocab_is_eog
        session.forget()
        for seat, prompt in enumerate(prompts):
            _read(session, seat, prompt[:-1])
        seats, outputs = np.arange(len(prompts)), np.ones(len(prompts), np.bool_)
        latest = np.array([prompt[-1] for prompt in prompts], np.int32)
        ends = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
        answers: list[list[int]] = [[] for _ in members]
        ended, told = [False] * len(members), 0
        for step in range(self.n_predict):
            session.feed(latest, ends + np.int32(step), seats, outputs)
            logits = session.logits(len(prompts))
            latest = logits.argmax(axis=1).astype(np.int32)  # the first of equals
            for seat in (seat for seat, end in enumerate(ended) if not end):
                if not np.isfinite(logits[seat, latest[seat]]):
                    raise self._not_a_number(members[seat])
                if is_end(self.vocab, int(latest[seat])):
                    ended[seat] = True
                else:
                    answers[seat].append(int(latest[seat]))
            if all(ended):
                break
            done = max(sum(ended), len(members) * step // self.n_predict)
            if done > told:
                hear(told := done)
        return answers, ended

    def _text(self, ids: Sequence[int]) -> str:
        """What the tokens stand for, control tokens written out; what is no UTF-8 is replaced."""
        data = bytearray()
        for token in ids:
            if len(data) > _LONGEST:
                break
            data += piece(self.library, self.vocab, token)
        return data[:_LONGEST].decode("utf-8", "replace")

    def _not_a_number(self, prompt: int) -> Refusal:
        return refuse(self.library, self.model, f"its logits for prompt {prompt + 1}", None, self.stop)


def _read(session: Session, seat: int, tokens: Tokens) -> None:
    """Compute ``tokens`` from a sequence's beginning, in pieces of about the same length that are no outputs."""
    if not len(tokens):
        return
    positions = np.arange(len(tokens), dtype=np.int32)
    for part in np.array_split(positions, -(-len(tokens) // session.options.n_ubatch)):
        session.feed(tokens[part], part, np.full(len(part), seat), np.zeros(len(part), np.bool_))
