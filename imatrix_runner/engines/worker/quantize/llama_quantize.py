"""Dry runs: the work of llama.cpp's ``tools/quantize/quantize.cpp`` around ``llama_model_quantize`` with ``--dry-run``.

llama.cpp itself decides the types of a level here; its bytes are made in :mod:`.pass_job`. llama.cpp's messages go to stderr,
as in llama-quantize, and so do llama-quantize's own messages about options that it rejects: the parent explains failures of
both engines by the same table, and a reply with exit code 5 refers to stderr. Other exit codes come with an exact reason (such
as a damaged imatrix).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from imatrix_runner.engines.files.imatrix_weights import ImatrixValues, read_weights
from imatrix_runner.engines.ftypes import COPY, find_type, ftypes_of, quant_types
from imatrix_runner.engines.jobs import QuantizeJob, QuantizeOptions
from imatrix_runner.engines.llama_cpp.output import QuantizeOutput
from imatrix_runner.engines.protocol import LEVEL_MARK, DryRunsJob, Planned, Send
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.quantize.overrides import (
    KeyValue,
    NotAccepted,
    imatrix_overrides,
    parse_layers,
    parse_override,
    parse_tensor_types,
    parse_type,
)
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.errors import RunnerError
from imatrix_runner.toolchain.quant_type import QuantType

_NEEDED = ("dry_run", "tt_overrides", "prune_layers", "max_buf_size", "imatrix", "kv_overrides")
_DEFAULT_BUFFER = 8 << 30
_NOTHING = (ctypes.c_float * 1)()
_ABORT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

# llama.cpp may log as long as the process lives, and does not know when Python frees a callback.
_kept_alive: list[Any] = []


def dry_runs(job: DryRunsJob, send: Send) -> None:
    """Send the plan of each level, or why it failed."""
    if hasattr(signal, "SIGPIPE"):
        # As in llama-quantize: once the output is closed, the next write ends the process.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    on_abort(load(), lambda message: write(message + b"\n"))  # without ggml's backtrace by a debugger
    for level in job.levels:
        say(f"{LEVEL_MARK}{level.ftype}\n")
        try:
            send(_dry_run(level))
        except Refusal as refusal:
            send(refusal.reply)


def _dry_run(job: QuantizeJob) -> Planned:
    """llama.cpp's plan of one level. Raises :class:`Refusal`."""
    what = f"llama.cpp cannot plan {job.ftype}"
    library = load()
    try:
        kind = _file_type(library, job.ftype)
        weights = chosen_weights(job.imatrix, job.options)
        call = _Call.of(library, job, kind, weights)
    except NotAccepted as refused:
        say(f"{refused}\n")
        raise Refusal.failed(what, str(refused)) from refused
    except RunnerError as error:
        raise Refusal(error.what, error.why, error.todo, error.exit_code) from error
    _announce(job, kind, weights)
    log = _Log()
    if call.run(library, log):
        say(f"llama_quantize: failed to quantize model from '{job.source}'\n")
        raise Refusal.failed(what, log.failure)
    dry = log.output.as_dry_run()
    return Planned(dict(dry.types), dry.fallbacks, dry.needs_imatrix)


def on_abort(library: Library, on_message: Callable[[bytes], None]) -> None:
    """Register ``on_message``, which ggml calls before it aborts the process, in the thread that aborts."""
    callback = _ABORT_CALLBACK(on_message)
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
def _read_once(path: Path) -> tuple[ImatrixValues, Mapping[bytes, float]]:
    """Read and check an imatrix once for all levels. Returns it, and of each entry with NaN or infinity the first of these;
    llama.cpp checks for them itself, but not in a dry run."""
    weights = read_weights(path)
    return weights, weights.not_finite()


def chosen_weights(imatrix: Path | None, options: QuantizeOptions) -> ImatrixValues | None:
    """The chosen part of the imatrix; None if there is no imatrix or nothing was chosen, which llama.cpp treats alike."""
    if options.include_weights and options.exclude_weights:
        raise NotAccepted("llama_quantize: --include-weights and --exclude-weights cannot be used together")
    if imatrix is None:
        return None
    include, exclude = (tuple(map(os.fsencode, given)) for given in (options.include_weights, options.exclude_weights))
    whole, not_finite = _read_once(imatrix)
    weights = whole.choose(include, exclude)
    bad = next((value for name, value in not_finite.items() if name in weights.values), None)
    if bad is not None:
        raise NotAccepted(f"imatrix contains non-finite value {bad:f}")
    return weights if weights.values else None


@dataclass(frozen=True)
class _Call:
    """The arguments of ``llama_model_quantize``. ``entries`` is the memory that ``parameters.imatrix`` points to."""

    source: bytes
    parameters: Any
    entries: Any

    @classmethod
    def of(cls, library: Library, job: QuantizeJob, kind: QuantType, weights: ImatrixValues | None) -> _Call:
        llama, options = library.llama, job.options
        parameters = _defaults(library)
        types = _tensor_types(library, parameters.output_tensor_type)
        parameters.nthread = job.threads or 0
        parameters.ftype = kind.number or 0
        parameters.only_copy = kind.name == COPY
        parameters.allow_requantize = options.allow_requantize
        parameters.quantize_output_tensor = not options.leave_output_tensor
        parameters.pure = options.pure
        parameters.keep_split = options.keep_split
        parameters.dry_run = True
        if options.output_tensor_type:
            parameters.output_tensor_type = parse_type(options.output_tensor_type, types)
        if options.token_embedding_type:
            parameters.token_embedding_type = parse_type(options.token_embedding_type, types)
        if options.max_buffer_size:
            parameters.max_buf_size = options.max_buffer_size << 20
        overrides = [parse_override(text) for text in options.override_kv]
        entries = None
        if weights is not None and job.imatrix is not None:
            # The bare name: the user's folders are private.
            overrides += imatrix_overrides(job.imatrix.name, weights)
            parameters.imatrix = entries = _imatrix(llama, weights.values)
        tensor_types = parse_tensor_types(options, types)
        layers = parse_layers(options.prune_layers) if options.prune_layers else []
        if overrides:
            parameters.kv_overrides = _key_values(llama, overrides)
        if tensor_types:
            parameters.tt_overrides = _patterns(llama, tensor_types)
        if layers:
            parameters.prune_layers = (ctypes.c_int32 * (len(layers) + 1))(*layers, -1)
        return cls(os.fsencode(job.source), parameters, entries)

    def run(self, library: Library, log: _Log) -> int:
        """Return llama.cpp's code; 0 is success. Raises the log callback's exception, if any."""
        llama = library.llama
        callback = llama.llama_log_callback(log)
        _kept_alive.append(callback)
        llama.llama_log_set(callback, None)
        try:
            code = int(llama.llama_model_quantize(self.source, b"", ctypes.byref(self.parameters)))
        finally:
            llama.llama_log_set(llama.llama_log_callback(0), None)
        if log.error is not None:
            raise log.error
        return code


def _defaults(library: Library) -> Any:
    """llama.cpp's defaults. Raises :class:`Refusal` if they show that the bindings' structure is not the library's."""
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
        raise Refusal.mismatch("llama_model_quantize_params of its library differs from that of its bindings")
    return parameters


def _tensor_types(library: Library, count: int) -> dict[bytes, int]:
    """Lower-case name -> number of the ggml types 0 .. ``count`` - 1; of two with one name the first is used."""
    names = [library.ggml("ggml_type_name")(number) for number in range(count)]
    return {name.lower(): number for number, name in reversed(list(enumerate(names))) if name}


def _imatrix(llama: Any, names: Collection[bytes]) -> Any:
    """Entries without values: a dry run only needs to know which tensors have weights."""
    entries = (llama.llama_model_imatrix_data * (len(names) + 1))()  # the last one's name is NULL
    for entry, name in zip(entries, names, strict=False):
        entry.name, entry.size = name, 0
        entry.data = ctypes.cast(_NOTHING, ctypes.POINTER(ctypes.c_float))
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
    """llama.cpp's log callback: writes messages to stderr and parses them."""

    def __init__(self) -> None:
        self.output = QuantizeOutput()
        self.failure = "it gave no reason"
        self.error: Exception | None = None

    def __call__(self, _level: int, text: bytes | None, _user_data: object) -> None:
        # ctypes would print an exception raised here, and go on.
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
        self.output.feed("stderr", said)


def _announce(job: QuantizeJob, kind: QuantType, weights: ImatrixValues | None) -> None:
    """Write to the log what llama-quantize prints before it begins."""
    if weights is not None:
        say(f"prepare_imatrix: have {len(weights.values)} importance matrix entries\n")
    threads = f" using {job.threads} threads" if job.threads else ""
    say(f"llama_quantize: calculating quantization size for '{job.source}' as {kind.name}{threads}\n")


def say(text: str) -> None:
    write(text.encode("utf-8", "replace"))


def write(data: bytes) -> None:
    while data:
        data = data[os.write(2, data) :]
