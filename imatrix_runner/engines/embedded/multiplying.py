"""The worker's proof that it multiplies: with weights of every main type, as models are loaded, and with the right result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.base import CollectOptions
from imatrix_runner.engines.embedded.batches import Slice
from imatrix_runner.engines.embedded.library import Library
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.engines.embedded.session import open_context, open_weights
from imatrix_runner.toolchain.proof_model import PROOF_CONTEXT, write_proof_model

_WHAT = "llama-cpp-python multiplies wrongly"
_FAR = 0.1
"""How far repacked weights may move the logits, root mean square, as a share of their spread. With ggml's AVX-512 kernels it is
0.015; one wrong tensor of the model's 240 moves them by 0.04 to 0.2, a type that is wrong in all of them by more."""


def multiply(library: Library, folder: Path, *, repack: bool) -> None:
    """Compute the proof model, which is written into ``folder``: without repacking, with ``repack`` also with it.

    Raises :class:`Refusal` for a wrong result; what crashes takes the process with it.
    """
    model = write_proof_model(folder / "proof.gguf")
    plain = _logits(library, model, repack=False)
    if not np.isfinite(plain).all():
        raise Refusal.failed(_WHAT, "it computes NaN or infinity from ordinary weights")
    if not repack:
        return
    distance = float(np.sqrt(np.mean((_logits(library, model, repack=True) - plain) ** 2)) / plain.std())
    if not distance < _FAR:
        raise Refusal.failed(_WHAT, f"with repacked weights its logits are {distance:.2g} of their spread away")


def _logits(library: Library, path: Path, *, repack: bool) -> npt.NDArray[np.float32]:
    """float32 [outputs, n_vocab] of two sequences, of one more token of each, and of one alone: each takes other kernels."""
    n = PROOF_CONTEXT
    # Two sequences; one thread, which is quickest for so little; llama.cpp rounds a context up to 256 tokens in any case.
    options = CollectOptions(n_ctx=256, n_batch=512, n_ubatch=2 * n, threads=1, n_gpu_layers="0", repack=repack)
    tokens = (np.arange(2 * (n + 2), dtype=np.int32) * 7 % 256).reshape(2, n + 2)
    with open_weights(library, path, options) as model, open_context(library, model, path, options, None) as session:
        parts = []
        for piece in (Slice(2, 0, n), Slice(2, n, n + 1), Slice(1, n + 1, n + 2)):
            count = session.compute(tokens[: piece.n_seq, piece.begin : piece.end], piece)
            parts.append(session.logits(count).copy())
        return np.concatenate(parts)
