"""One level in this process: what llama.cpp's ``tools/quantize/quantize.cpp`` does around ``llama_model_quantize``.

Everything llama.cpp says goes to stderr, as from llama-quantize. So does what llama-quantize itself would say about options
it does not take: the parent explains failures of both engines from the same words, and an answer with exit code 5 means
"see there". Other exit codes come with an exact answer (a damaged imatrix, an unknown type).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from imatrix_runner.engines.base import QuantizeOptions
from imatrix_runner.engines.binaries.lines import QuantizeOutput
from imatrix_runner.engines.embedded.levels import COPY, find_type, ftypes_of, quant_types
from imatrix_runner.engines.embedded.library import Library, load
from imatrix_runner.engines.embedded.overrides import (
    KeyValue,
    NotAccepted,
    imatrix_overrides,
    parse_layers,
    parse_override,
    parse_tensor_types,
    parse_type,
)
from imatrix_runner.engines.embedded.protocol import Answer, Planned, Quantize, Written
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.engines.embedded.weights import Values, Weights, read_weights
from imatrix_runner.errors import RunnerError
from imatrix_runner.events import Progress
from imatrix_runner.toolchain.probe import QuantType

_NEEDED = ("dry_run", "tt_overrides", "prune_layers", "max_buf_size", "imatrix", "kv_overrides")
_DEFAULT_BUFFER = 8 << 30
_NONE: Values = np.empty(0, np.float32)
_WITHOUT_WEIGHTS = b"GGML_ASSERT(imatrix != NULL)"  # ggml.c, ggml_quantize_chunk
_ABORT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

# llama.cpp may log as long as the process lives, and calls a collected callback all the same.
_kept_alive: list[Any] = []


def quantize(request: Quantize, tell: Callable[[Answer], None]) -> None:
    """Write the level to ``request.out``, or with ``dry_run`` tell what it would be. Raises :class:`Refusal`."""
    what = f"llama.cpp cannot {'plan' if request.dry_run else 'make'} {request.ftype}"
    if hasattr(signal, "SIGPIPE"):
        # Like llama-quantize: when nobody listens any more, the next word ends the work.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    library = load()
    try:
        kind = _file_type(library, request.ftype)
        weights = chosen_weights(request.imatrix, request.options)
        call = _Call.of(library, request, kind, weights)
    except NotAccepted as refused:
        say(f"{refused}\n")
        raise Refusal.failed(what, str(refused)) from refused
    except RunnerError as error:
        raise Refusal(error.what, error.why, error.todo, error.exit_code) from error
    _announce(request, kind, call, weights)
    log = _Log(request.step, tell)

    def aborting(message: bytes) -> None:
        """What llama.cpp takes for impossible; the process ends when this returns, and without a debugger's view of it."""
        write(message + b"\n")
        if _WITHOUT_WEIGHTS in message:
            # A low-bit type for the embeddings or the output, which llama.cpp does not check as it does other tensors.
            words = f"Missing importance matrix for tensor {log.output.tensor} in a very low-bit quantization"
            say(f"{words}\n")
            refusal = Refusal.failed(what, words)
            tell(refusal.answer)
            os._exit(refusal.answer.exit_code)

    on_abort(library, aborting)
    if call.run(library, log):
        say(f"llama_quantize: failed to quantize model from '{request.source}'\n")
        raise Refusal.failed(what, log.failure)
    output = log.output
    if request.dry_run:
        dry = output.as_dry_run()
        tell(Planned(dict(dry.types), dry.fallbacks, dry.needs_imatrix))
    else:
        tell(Written(tuple(output.fallbacks), tuple(output.without_weights)))


def on_abort(library: Library, heard: Callable[[bytes], None]) -> None:
    """Have ``heard`` called, in whatever thread it happens, before ggml aborts the process."""
    callback = _ABORT_CALLBACK(heard)
    _kept_alive.append(callback)
    set_callback = library.symbol("ggml_set_abort_callback")
    set_callback.argtypes, set_callback.restype = (_ABORT_CALLBACK,), ctypes.c_void_p
    set_callback(callback)


def _file_type(library: Library, name: str) -> QuantType:
    kind = find_type(quant_types(ftypes_of(vars(library.llama))), name)
    if kind is None:
        raise NotAccepted(f"llama_quantize: invalid ftype '{name}'")
    return kind


@lru_cache(maxsize=1)
def _chosen_once(path: Path, include: tuple[bytes, ...], exclude: tuple[bytes, ...]) -> Weights:
    """Read and checked once for the many levels of a plan. llama.cpp looks for NaN itself (in what was chosen), but not in a
    dry run."""
    weights = read_weights(path).choose(include, exclude)
    bad = weights.not_finite()
    if bad is not None:
        raise NotAccepted(f"imatrix contains non-finite value {bad:f}")
    return weights


def chosen_weights(imatrix: Path | None, options: QuantizeOptions) -> Weights | None:
    """The chosen part of the imatrix; None when there is none or nothing of it was chosen, which is the same to llama.cpp."""
    if options.include_weights and options.exclude_weights:
        raise NotAccepted("llama_quantize: --include-weights and --exclude-weights cannot be used together")
    if imatrix is None:
        return None
    include, exclude = (tuple(map(os.fsencode, given)) for given in (options.include_weights, options.exclude_weights))
    weights = _chosen_once(imatrix, include, exclude)
    return weights if weights.values else None


@dataclass(frozen=True)
class _Call:
    """The arguments of ``llama_model_quantize``. ``keep`` is the memory that ``parameters`` points to."""

    source: bytes
    out: bytes
    parameters: Any
    keep: tuple[Any, ...]

    @classmethod
    def of(cls, library: Library, request: Quantize, kind: QuantType, weights: Weights | None) -> _Call:
        llama, options = library.llama, request.options
        parameters = _defaults(library)
        types = _tensor_types(library, parameters.output_tensor_type)
        parameters.nthread = request.threads or 0
        parameters.ftype = kind.number or 0
        parameters.only_copy = kind.name == COPY
        parameters.allow_requantize = options.allow_requantize
        parameters.quantize_output_tensor = not options.leave_output_tensor
        parameters.pure = options.pure
        parameters.keep_split = options.keep_split
        parameters.dry_run = request.dry_run
        if options.output_tensor_type:
            parameters.output_tensor_type = parse_type(options.output_tensor_type, types)
        if options.token_embedding_type:
            parameters.token_embedding_type = parse_type(options.token_embedding_type, types)
        if options.max_buffer_size:
            parameters.max_buf_size = options.max_buffer_size << 20
        overrides = [parse_override(text) for text in options.override_kv]
        if weights is not None and request.imatrix is not None:
            # The bare name: a user's folders have no business in the file.
            overrides += imatrix_overrides(request.imatrix.name, weights)
            # A dry run only wants to know that there are weights; they would be copied for every level of a plan.
            values = dict.fromkeys(weights.values, _NONE) if request.dry_run else dict(weights.values)
            parameters.imatrix = imatrix = _imatrix(llama, values)
        else:
            imatrix = values = None
        tensor_types = parse_tensor_types(options, types)
        layers = parse_layers(options.prune_layers) if options.prune_layers else []
        if overrides:
            parameters.kv_overrides = _key_values(llama, overrides)
        if tensor_types:
            parameters.tt_overrides = _patterns(llama, tensor_types)
        if layers:
            parameters.prune_layers = (ctypes.c_int32 * (len(layers) + 1))(*layers, -1)
        out = b"" if request.dry_run else os.fsencode(_out(request))
        return cls(os.fsencode(request.source), out, parameters, (imatrix, values))

    def run(self, library: Library, log: _Log) -> int:
        """The return code; 0 is success. What was raised while listening is raised here."""
        llama = library.llama
        callback = llama.llama_log_callback(log)
        _kept_alive.append(callback)
        llama.llama_log_set(callback, None)
        try:
            code = int(llama.llama_model_quantize(self.source, self.out, ctypes.byref(self.parameters)))
        finally:
            llama.llama_log_set(llama.llama_log_callback(0), None)
        if log.error is not None:
            raise log.error
        return code


def _out(request: Quantize) -> Path:
    out = request.out
    try:
        same = request.source.samefile(out)
    except OSError:
        same = False  # usually because there is no such file yet; what else is wrong llama.cpp will find
    if same:
        raise NotAccepted(f"llama_quantize: error: input and output files are the same: '{request.source}'")
    return out.with_suffix("") if request.options.keep_split and out.suffix == ".gguf" else out


def _defaults(library: Library) -> Any:
    """llama.cpp's defaults. They are known, so they show whether the bindings' structure is the library's."""
    parameters = library.llama.llama_model_quantize_default_params()
    missing = [name for name in _NEEDED if not hasattr(parameters, name)]
    if missing:
        raise Refusal.mismatch(f"llama-cpp-python {library.version} has no {missing[0]}; 0.3.36 and newer do")
    flags = (parameters.allow_requantize, parameters.only_copy, parameters.pure, parameters.keep_split, parameters.dry_run)
    pointers = (parameters.imatrix, parameters.kv_overrides, parameters.tt_overrides, parameters.prune_layers)
    if (
        parameters.max_buf_size not in (0, _DEFAULT_BUFFER)
        or parameters.output_tensor_type != parameters.token_embedding_type
        or not parameters.quantize_output_tensor
        or any(flags)
        or any(pointers)
    ):
        raise Refusal.mismatch("its library's settings for quantising are not laid out as its bindings say")
    return parameters


def _tensor_types(library: Library, count: int) -> dict[bytes, int]:
    """Lower-case name -> number of the ggml types 0 .. ``count`` - 1; of two with one name the first counts."""
    names = [library.ggml("ggml_type_name")(number) for number in range(count)]
    return {name.lower(): number for number, name in reversed(list(enumerate(names))) if name}


def _imatrix(llama: Any, weights: Mapping[bytes, Values]) -> Any:
    entries = (llama.llama_model_imatrix_data * (len(weights) + 1))()  # the last one's name is NULL
    for entry, (name, values) in zip(entries, weights.items(), strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def _key_values(llama: Any, overrides: Sequence[KeyValue]) -> Any:
    entries = (llama.llama_model_kv_override * (len(overrides) + 1))()  # the last one's key is empty
    for entry, override in zip(entries, overrides, strict=False):
        entry.key, value = override.key, override.value
        if isinstance(value, bool):
            entry.tag, entry.value.val_bool = llama.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            entry.tag, entry.value.val_f64 = llama.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            entry.tag, entry.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, value
    return entries


def _patterns(llama: Any, patterns: Sequence[tuple[bytes, int]]) -> Any:
    entries = (llama.llama_model_tensor_override * (len(patterns) + 1))()  # the last one's pattern is NULL
    for entry, (pattern, number) in zip(entries, patterns, strict=False):
        entry.pattern, entry.type = pattern, number
    return entries


class _Log:
    """llama.cpp's log callback: its words go to stderr and through the parser, progress is told as it changes."""

    def __init__(self, step: str, tell: Callable[[Answer], None]) -> None:
        self.output = QuantizeOutput()
        self.failure = "it gave no reason"
        self.error: Exception | None = None
        self._step, self._tell = step, tell

    def __call__(self, _level: int, text: bytes | None, _user_data: object) -> None:
        # ctypes would print what is raised in here, and go on.
        try:
            self._follow(text or b"")
        except Exception as error:  # noqa: BLE001 - raised again when llama.cpp returns
            self.error = self.error or error

    def _follow(self, text: bytes) -> None:
        write(text)
        said = text.decode("utf-8", "replace")
        _, failed, why = said.partition("failed to quantize: ")
        if failed:
            self.failure = why.strip()
        output = self.output
        if output.feed("stderr", said):
            self._tell(Progress(self._step, output.elements, note=f"{output.index}/{output.total} {output.tensor}"))


def _announce(request: Quantize, kind: QuantType, call: _Call, weights: Weights | None) -> None:
    """For the log: what llama-quantize says before it begins."""
    if weights is not None:
        say(f"prepare_imatrix: have {len(weights.values)} importance matrix entries\n")
    doing = "calculating quantization size for" if request.dry_run else "quantizing"
    to = "" if request.dry_run else f" to '{os.fsdecode(call.out)}'"
    threads = f" using {request.threads} threads" if request.threads else ""
    say(f"llama_quantize: {doing} '{request.source}'{to} as {kind.name}{threads}\n")


def say(text: str) -> None:
    write(text.encode("utf-8", "replace"))


def write(data: bytes) -> None:
    while data:
        data = data[os.write(2, data) :]
