"""The command that collects a matrix again: llama-imatrix, or imatrix-runner where llama-imatrix cannot do it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from imatrix_runner.context.requests import ImatrixRequest
from imatrix_runner.documents.corpus import Corpus
from imatrix_runner.fingerprints import words_of


def repeat_command(request: ImatrixRequest, model: Path, corpus: Corpus, out: Path) -> tuple[str, ...]:
    """The words of the command. How often llama-imatrix saves on the way is left out, because it does not change the result."""
    ours = request.until_converged is not None or request.min_expert_tokens > 0
    options, extra = replace(request.options, extra=()), request.options.extra
    words = ["imatrix-runner", "imatrix", "generate", str(model)] if ours else ["llama-imatrix", "-m", str(model)]
    words += ["-f", str(corpus.path.absolute()), "-o", str(out), "-c", str(options.n_ctx)]
    words += ["--chunks", str(request.chunks)] if request.chunks is not None else []
    words += ["--chunk", str(request.first_chunk)] if request.first_chunk else []
    words += words_of(request, "imatrix") if ours else []
    words += words_of(options, "imatrix")
    return (*words, *(("--",) if ours and extra else ()), *extra)
