"""The worker's proof of its footing: before any memory is read by offset, and for whoever asks what this library can do."""

from __future__ import annotations

from collections.abc import Callable

from imatrix_runner.engines.embedded.kernels import PASS_FUNCTIONS
from imatrix_runner.engines.embedded.layout import Operations, check_layout
from imatrix_runner.engines.embedded.library import Library, load
from imatrix_runner.engines.embedded.multiplying import multiply
from imatrix_runner.engines.embedded.protocol import Answer, Probe, Proven
from imatrix_runner.engines.embedded.refusal import Refusal

# What the collector calls; an older llama-cpp-python lacks some of them.
_FUNCTIONS = (
    *("llama_model_default_params", "llama_context_default_params", "llama_model_load_from_file", "llama_init_from_model"),
    *("llama_model_get_vocab", "llama_vocab_get_add_bos", "llama_vocab_get_add_eos", "llama_vocab_bos", "llama_vocab_n_tokens"),
    *("llama_tokenize", "llama_batch_init", "llama_decode", "llama_get_memory", "llama_memory_clear", "llama_synchronize"),
    *("llama_get_logits", "llama_model_quantize", "llama_log_set", "llama_print_system_info"),
    *("llama_model_n_ctx_train", "llama_token_to_piece", "llama_vocab_is_eog"),
)
_PREFIX = "LLAMA_FTYPE_"


def prove(request: Probe, tell: Callable[[Answer], None]) -> None:
    """Load, check, multiply, and tell what there is."""
    library = load()
    check(library)
    multiply(library, request.folder, repack=request.repack)
    llama = library.llama
    devices = library.devices()
    names = [name for name in dir(llama) if name.startswith(_PREFIX)]
    tell(
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
    """The library has every function we call and lays its tensors out as we read them. Raises :class:`Refusal`."""
    missing = [name for name in _FUNCTIONS if not hasattr(library.llama, name)]
    if missing:
        raise Refusal.mismatch(f"llama-cpp-python {library.version} has no {missing[0]}; 0.3.36 and newer do")
    for name in PASS_FUNCTIONS:
        library.ggml(name)
    check_layout(library)
    return Operations.of(library)
