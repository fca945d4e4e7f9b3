"""The worker: one request as its argument (or ``@FILE`` with it), JSON lines on stdout, llama.cpp's own words on stderr."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from imatrix_runner.engines.embedded.protocol import (
    Answer,
    Check,
    Collect,
    Failed,
    Generate,
    Judge,
    Pass,
    Plan,
    Probe,
    Quantize,
    Refer,
    Tokenize,
    TokenizeTexts,
    decode_request,
    encode,
)
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.errors import RunnerError


def main() -> int:
    # Native code may print to stdout: the answers get a descriptor of their own.
    answers = os.dup(1)
    os.dup2(2, 1)

    lock = threading.Lock()

    def tell(answer: Answer) -> None:
        line = encode(answer) + b"\n"
        with lock, suppress(BrokenPipeError):  # the parent is dead; stdin tells so too, and then what is done is kept
            while line:
                line = line[os.write(answers, line) :]

    argument = sys.argv[1]
    request = decode_request(Path(argument[1:]).read_text(encoding="utf-8") if argument.startswith("@") else argument)
    try:
        if isinstance(request, Probe):
            from imatrix_runner.engines.embedded.proof import prove

            prove(request, tell)
        elif isinstance(request, Tokenize):
            from imatrix_runner.engines.embedded.tokens import count

            count(request, tell)
        elif isinstance(request, TokenizeTexts):
            from imatrix_runner.engines.embedded.tokens import tokenize_texts

            tokenize_texts(request, tell)
        elif isinstance(request, Collect):
            from imatrix_runner.engines.embedded.collecting import collect

            collect(request, tell)
        elif isinstance(request, Refer):
            from imatrix_runner.engines.embedded.evaluating import refer

            refer(request, tell)
        elif isinstance(request, Judge):
            from imatrix_runner.engines.embedded.evaluating import judge

            judge(request, tell)
        elif isinstance(request, Generate):
            from imatrix_runner.engines.embedded.answering import answer

            answer(request, tell)
        elif isinstance(request, Quantize):
            from imatrix_runner.engines.embedded.quantizing import quantize

            quantize(request, tell)
        elif isinstance(request, Pass):
            from imatrix_runner.engines.embedded.single_pass import single_pass

            single_pass(request, tell)
        elif isinstance(request, Check):
            from imatrix_runner.engines.embedded.validating import check

            check(request, tell)
        elif isinstance(request, Plan):
            from imatrix_runner.engines.embedded.quantizing import quantize

            for level in request.levels:
                try:
                    quantize(level, tell)
                except Refusal as refusal:
                    tell(refusal.answer)
    except Refusal as refusal:
        tell(refusal.answer)
        return refusal.answer.exit_code
    except RunnerError as error:  # of what lies lower than an engine, such as a file of log-probabilities
        tell(Failed(error.what, error.why, error.todo, error.exit_code))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
