"""Checks of the loaded library, before any memory is read by offset, and the reply to a probe."""

from __future__ import annotations

from imatrix_runner.engines.protocol import ProbeJob, Proven, Send
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.multiply import multiply
from imatrix_runner.engines.worker.quantize.ggml_rows import PASS_FUNCTIONS
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.tensor_layout import Operations, check_layout

# Functions that the worker calls; an older llama-cpp-python lacks some of them.
_FUNCTIONS = (
    *("llama_model_default_params", "llama_context_default_params", "llama_model_load_from_file", "llama_init_from_model"),
    *("llama_model_get_vocab", "llama_vocab_get_add_bos", "llama_vocab_get_add_eos", "llama_vocab_bos", "llama_vocab_n_tokens"),
    *("llama_tokenize", "llama_batch_init", "llama_decode", "llama_get_memory", "llama_memory_clear", "llama_synchronize"),
    *("llama_get_logits", "llama_model_quantize", "llama_log_set", "llama_print_system_info"),
    *("llama_model_n_ctx_train", "llama_token_to_piece", "llama_vocab_is_eog"),
)
_PREFIX = "LLAMA_FTYPE_"


def prove(job: ProbeJob, send: Send) -> None:
    """Load the library, check it, compute the proof model, and send what the library can do."""
    library = load()
    check(library)
    multiply(library, job.folder, repack=job.repack)
    llama = library.llama
    devices = library.devices()
    names = [name for name in dir(llama) if name.startswith(_PREFIX)]
    send(
        Proven(
            version=library.version,
            library=library.directory,
            ggml=" ".join(library.ggml(name)().decode("utf-8", "replace") for name in ("ggml_version", "ggml_commit")),
            features=llama.llama_print_system_info().decode("utf-8", "replace").strip(" |"),
            devices=tuple(str(device) for device in devices if device.is_gpu),
            backends=tuple(dict.fromkeys(device.name.rstrip("0123456789").lower() for device in devices)),
            ftypes={name[len(_PREFIX) :]: int(getattr(llama, name)) for name in names},
        )
    )


def check(library: Library) -> Operations:
    """Check that the library has the required functions and tensor layout. Raises :class:`Refusal`."""
    missing = [name for name in _FUNCTIONS if not hasattr(library.llama, name)]
    if missing:
        raise Refusal.mismatch(f"llama-cpp-python {library.version} has no {missing[0]}; 0.3.36 and newer do")
    for name in PASS_FUNCTIONS:
        library.ggml(name)
    check_layout(library)
    return Operations.of(library)
