"""Checks that the library multiplies correctly with weights of every main type, loaded as models are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.worker.batching import MicroBatch
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.llama_context import open_context, open_weights
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.toolchain.proof_model import PROOF_CONTEXT, write_proof_model

_WHAT = "llama-cpp-python multiplies wrongly"
_FAR = 0.1
"""Largest root mean square change of the logits by repacked weights, as a fraction of their standard deviation. ggml's AVX-512
kernels change them by 0.015; one wrong tensor of the model's 240 by 0.04 to 0.2, a type that is always wrong by more."""


def multiply(library: Library, folder: Path, *, repack: bool) -> None:
    """Compute the proof model, written to ``folder``, without repacking and (if ``repack``) with it.

    Raises :class:`Refusal` for a wrong result; a crash ends the process.
    """
    model = write_proof_model(folder / "proof.gguf")
    plain = _logits(library, model, repack=False)
    if not np.isfinite(plain).all():
        raise Refusal.failed(_WHAT, "it computes NaN or infinity from ordinary weights")
    if not repack:
        return
    distance = float(np.sqrt(np.mean((_logits(library, model, repack=True) - plain) ** 2)) / plain.std())
    if not distance < _FAR:
        raise Refusal.failed(_WHAT, f"repacked weights change its logits by {distance:.2g} of their standard deviation")


def _logits(library: Library, path: Path, *, repack: bool) -> npt.NDArray[np.float32]:
    """float32 [outputs, n_vocab] for two sequences, one more token of each, and one token alone: each uses other kernels."""
    n = PROOF_CONTEXT
    # Two sequences; one thread, the fastest for so little work; llama.cpp rounds a context up to 256 tokens anyway.
    options = CollectOptions(n_ctx=256, n_batch=512, n_ubatch=2 * n, threads=1, n_gpu_layers="0", repack=repack)
    tokens = (np.arange(2 * (n + 2), dtype=np.int32) * 7 % 256).reshape(2, n + 2)
    with open_weights(library, path, options) as model, open_context(library, model, path, options, None) as context:
        parts = []
        for ubatch in (MicroBatch(2, 0, n), MicroBatch(2, n, n + 1), MicroBatch(1, n + 1, n + 2)):
            count = context.compute(tokens[: ubatch.n_seq, ubatch.begin : ubatch.end], ubatch)
            parts.append(context.logits(count).copy())
        return np.concatenate(parts)
