"""A model and a context set up as llama-imatrix sets them up (``common_init_from_params`` of common/common.cpp)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.worker.batching import MicroBatch, largest
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.tokens import Tokens, open_model

_SPLIT_MODES = {"none": "NONE", "layer": "LAYER", "row": "ROW", "tensor": "TENSOR"}
_FLASH = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


class _BufferOverride(ctypes.Structure):
    """llama.h, ``struct llama_model_tensor_buft_override``."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@dataclass(frozen=True)
class LlamaContext:
    """An open context. ``add_bos``: every chunk's first token becomes ``bos``."""

    library: Library
    pointer: Any
    vocab: Any
    n_vocab: int
    add_bos: bool
    bos: int
    options: CollectOptions
    batch: Any

    def forget(self) -> None:
        """Clear the context's memory, before other chunks."""
        llama = self.library.llama
        llama.llama_memory_clear(llama.llama_get_memory(self.pointer), True)

    def compute(self, tokens: Tokens, ubatch: MicroBatch, first_output: int = 0) -> int:
        """Compute ``tokens`` int32 [n_seq, n_slice], a slice of ``n_seq`` chunks. Raises :class:`Refusal`.

        Positions from ``first_output`` on are outputs; returns how many there are, over all chunks.
        """
        positions = np.tile(np.arange(ubatch.begin, ubatch.end, dtype=np.int32), ubatch.n_seq)
        # For an imatrix every token is an output: otherwise the last layer would compute only some of them.
        outputs = positions >= first_output
        self.feed(tokens.ravel(), positions, np.repeat(np.arange(ubatch.n_seq), ubatch.end - ubatch.begin), outputs)
        return int(outputs.sum())

    def feed(self, tokens: Tokens, positions: Tokens, sequences: npt.NDArray[np.int64], outputs: npt.NDArray[np.bool_]) -> None:
        """Compute one batch: tokens, their positions and sequences, and whether each is an output, all [n]."""
        batch, n = self.batch, len(tokens)
        _view(batch.token, np.int32, n)[:] = tokens
        _view(batch.pos, np.int32, n)[:] = positions
        _view(batch.logits, np.int8, n)[:] = outputs
        _view(batch.n_seq_id, np.int32, n)[:] = 1
        for index, sequence in enumerate(sequences.tolist()):
            batch.seq_id[index][0] = sequence
        batch.n_tokens = n
        status = self.library.llama.llama_decode(self.pointer, batch)
        if status:
            raise Refusal.failed("llama.cpp failed to compute a batch", f"llama_decode returned {status}")
        self.library.llama.llama_synchronize(self.pointer)

    def logits(self, n_tokens: int) -> npt.NDArray[np.float32]:
        """float32 [n_tokens, n_vocab]: the outputs of the last batch; valid until the next."""
        address = self.library.llama.llama_get_logits(self.pointer)
        logits: npt.NDArray[np.float32] = _view(address, np.float32, n_tokens * self.n_vocab).reshape(n_tokens, -1)
        return logits


@contextmanager
def load_context(library: Library, path: Path, options: CollectOptions, callback: Any) -> Iterator[LlamaContext]:
    """Load a model and create a context with an evaluation ``callback`` (or None). Raises :class:`Refusal`."""
    with open_weights(library, path, options) as model, open_context(library, model, path, options, callback) as context:
        yield context


@contextmanager
def open_weights(library: Library, path: Path, options: CollectOptions) -> Iterator[Any]:
    """Load a model."""
    overrides = _overrides(library, options)
    model = open_model(library, path, _model_params(library, options, overrides))
    try:
        yield model
    finally:
        library.llama.llama_model_free(model)


@contextmanager
def open_context(library: Library, model: Any, path: Path, options: CollectOptions, callback: Any) -> Iterator[LlamaContext]:
    """A context of a loaded model. Raises :class:`Refusal`."""
    llama = library.llama
    pointer = batch = None
    try:
        vocab = llama.llama_model_get_vocab(model)
        if llama.llama_model_has_encoder(model):
            raise _no_next_token(path)
        pointer = llama.llama_init_from_model(model, _context_params(library, options, callback))
        if not pointer:
            raise Refusal.failed(
                f"llama.cpp cannot set up {path.name}",
                "there is not enough memory for its buffers, or an option does not fit the model",
                "Read the log; try a smaller -b or -c, fewer layers with -ngl, or --engine binaries.",
            )
        if not llama.llama_get_memory(pointer):
            raise _no_next_token(path)
        batch = llama.llama_batch_init(largest(options), 0, 1)
        n_vocab = llama.llama_vocab_n_tokens(vocab)
        add_bos = bool(llama.llama_vocab_get_add_bos(vocab))
        yield LlamaContext(library, pointer, vocab, n_vocab, add_bos, llama.llama_vocab_bos(vocab), options, batch)
    finally:
        if batch is not None:
            llama.llama_batch_free(batch)
        if pointer:
            llama.llama_free(pointer)


def _no_next_token(path: Path) -> Refusal:
    return Refusal.invalid(
        f"{path.name} predicts no next token",
        "llama.cpp computes it as an encoder, as it does embedding and diffusion models",
        "Quantise it without an imatrix (--imatrix none), and leave --evaluate and --domain out.",
    )


def _view(pointer: Any, kind: Any, count: int) -> Any:
    address = ctypes.cast(pointer, ctypes.c_void_p).value
    return np.frombuffer((ctypes.c_char * (count * np.dtype(kind).itemsize)).from_address(address), kind)


def _model_params(library: Library, options: CollectOptions, overrides: Any) -> Any:
    llama = library.llama
    params = llama.llama_model_default_params()
    layers = options.n_gpu_layers
    if layers:
        params.n_gpu_layers = {"auto": -1, "all": -2}.get(layers) or int(layers)
    if options.split_mode:
        params.split_mode = getattr(llama, f"LLAMA_SPLIT_MODE_{_SPLIT_MODES[options.split_mode]}")
    if options.main_gpu is not None:
        params.main_gpu = options.main_gpu
    if options.tensor_split:
        params.tensor_split = _shares(options.tensor_split, llama.llama_max_devices())
    if not options.mmap:
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
    if not options.repack:
        params.use_extra_bufts = False
    if overrides is not None:
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return params


def _context_params(library: Library, options: CollectOptions, callback: Any) -> Any:
    llama = library.llama
    params = llama.llama_context_default_params()
    params.n_seq_max = options.chunks_at_once
    params.n_ctx = options.chunks_at_once * options.n_ctx
    params.n_batch = min(options.n_batch, params.n_ctx)
    params.n_ubatch = options.n_ubatch
    params.n_outputs_max_per_seq = 0
    threads = options.threads or usable_cpus()
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = getattr(llama, f"LLAMA_FLASH_ATTN_TYPE_{_FLASH[options.flash_attn or 'auto']}")
    params.swa_full = False
    if callback is not None:
        params.cb_eval = callback
    return params


def usable_cpus() -> int:
    """Number of CPUs that this process may use; in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(text: str, n_devices: int) -> Any:
    """``-ts 3,1`` as an array of proportions, zero for the other devices. Raises :class:`Refusal`."""
    try:
        shares = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError as error:
        why = "expected proportions, numbers separated by commas"
        raise Refusal.invalid(f"Invalid -ts {text!r}", why, "For example: -ts 3,1") from error
    if len(shares) >= n_devices:
        raise Refusal.invalid(
            f"-ts {text} has {len(shares)} shares", f"this build supports at most {n_devices - 1}", "Give fewer."
        )
    return (ctypes.c_float * n_devices)(*shares)


def _overrides(library: Library, options: CollectOptions) -> Any:
    """``-ot REGEX=BUFFER,…`` as an array that ends with an empty entry; None when there are none."""
    entries = [entry for option in options.override_tensors for entry in option.split(",") if entry]
    if not entries:
        return None
    name = library.ggml("ggml_backend_buft_name")
    buffers = {name(device.buffer).decode(): device.buffer for device in library.devices() if device.buffer}
    pairs = []
    for entry in entries:
        pattern, equals, wanted = entry.partition("=")
        if not equals or wanted not in buffers:
            raise Refusal.invalid(
                f"Invalid -ot {entry!r}",
                f"expected REGEX=BUFFER, with a buffer among {', '.join(sorted(buffers))}",
                "For example: -ot 'ffn_.*_exps=CPU'",
            )
        pairs.append(_BufferOverride(pattern.encode(), buffers[wanted]))
    return (_BufferOverride * (len(pairs) + 1))(*pairs, _BufferOverride(None, None))
