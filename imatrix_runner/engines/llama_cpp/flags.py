"""Argument lists for llama.cpp's programs. Pure; what each option does is in llama.cpp's ``common/arg.cpp`` and
``tools/quantize/quantize.cpp``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from imatrix_runner.engines.jobs import ChunkRange, CollectJob, CollectOptions, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.measures import MeasureJob, ReferenceJob
from imatrix_runner.errors import ToolchainError, UsageError
from imatrix_runner.process import Command
from imatrix_runner.toolchain.probe import Toolchain

# llama-imatrix's periodic saves are torn (they happen inside the callback, between two tensors of a chunk), and
# ``-ofreq 0`` divides by zero: a number that no run reaches switches them off.
NEVER = "1000000000"

PERPLEXITY = "llama-perplexity"

ADD_END = "tokenizer.ggml.add_eos_token"
"""Metadata: whether the vocabulary ends every text with a token."""

# With --no-ppl there is no line per chunk; at this verbosity the collector prints its current chunk.
_VERBOSE, _OLD_VERBOSE = "5", "2"
_ALL_LAYERS = "999"  # for programs whose -ngl takes numbers only


def imatrix_command(job: CollectJob, chunks: ChunkRange, out: Path, tools: Toolchain, *, ends_texts: bool = False) -> Command:
    """llama-imatrix for one range of a job's chunks, writing ``out``. Raises :class:`UsageError` for an option it lacks.

    ``ends_texts``: the vocabulary ends every text with a token, which the program refuses (chunks have no end) unless it is
    overridden.
    """
    options = job.options
    argv = [
        str(tools.tool("llama-imatrix")),
        *("-m", _path(job.model), "-f", _path(job.text), "-o", _path(out)),
        *("--output-frequency", NEVER, _first_chunk(tools), str(chunks.first), "--chunks", str(chunks.count)),
        *_compute("llama-imatrix", options, tools, ends_texts=ends_texts),
    ]
    if options.parse_special:
        argv.append(_known("llama-imatrix", tools, "--parse-special"))
    if options.process_output:
        argv += ["--process-output"] if tools.knows("llama-imatrix", "--process-output") else ["-ow", "1"]
    if not options.ppl:
        argv += ["--no-ppl", *_talkative(tools)]
    argv += _extra(options)
    return Command(tuple(argv), cwd=_aside("llama-imatrix", tools, out.parent))


def _first_chunk(tools: Toolchain) -> str:
    """The option for the first chunk. Until June 2024 it had another name, which llama-imatrix's help did not list."""
    return "--chunk" if tools.knows("llama-imatrix", "--chunk") else "--from-chunk"


def _aside(tool: str, tools: Toolchain, folder: Path) -> Path | None:
    """The working directory for a program that leaves a log file in it; None for other programs."""
    return folder.absolute() if tools.takes(tool).leaves_log else None


def _talkative(tools: Toolchain) -> list[str]:
    if tools.knows("llama-imatrix", "-lv"):
        return ["-lv", _VERBOSE]
    return ["--verbosity", _OLD_VERBOSE] if tools.knows("llama-imatrix", "--verbosity") else []


def reference_command(job: ReferenceJob, out: Path, tools: Toolchain, *, ends_texts: bool = False) -> Command:
    """llama-perplexity for the first chunks of a text, writing log-probabilities to ``out``. Raises :class:`UsageError` for
    what it cannot do."""
    if job.chunks.first:
        raise _begins_at_the_beginning(f"the job begins with chunk {job.chunks.first}")
    if job.options.parse_special:
        raise UsageError(
            "llama-perplexity reads every text as plain text",
            "it has no --parse-special, with which special tokens in the text would be recognised",
            "Leave that option out, or use --engine embedded.",
        )
    argv = [
        str(tools.tool(PERPLEXITY)),
        *("-m", _path(job.model), "-f", _path(job.text), "--kl-divergence-base", _path(out), "--chunks", str(job.chunks.count)),
        *_compute(PERPLEXITY, job.options, tools, ends_texts=ends_texts),
        *_extra(job.options),
    ]
    return Command(tuple(argv), cwd=_aside(PERPLEXITY, tools, out.parent))


def measure_command(job: MeasureJob, base: Path, tools: Toolchain, *, ends_texts: bool = False) -> Command:
    """llama-perplexity comparing a level with all of ``base``, which holds the text's tokens. Raises :class:`UsageError` if
    ``base`` is a later part of a text: percentiles of parts cannot be combined."""
    if job.first:
        raise _begins_at_the_beginning(f"the reference at hand begins with chunk {job.first}")
    argv = [
        str(tools.tool(PERPLEXITY)),
        *("-m", _path(job.model), "--kl-divergence", "--kl-divergence-base", _path(base)),
        # Logits do not show a NaN that ggml turned into a number when it quantised activations to 8 bits.
        *(["--check-tensors"] if tools.knows(PERPLEXITY, "--check-tensors") else []),
        *_compute(PERPLEXITY, job.options, tools, ends_texts=ends_texts),
        *_extra(job.options),
    ]
    return Command(tuple(argv), cwd=_aside(PERPLEXITY, tools, job.out.parent))


def _path(path: Path) -> str:
    """The absolute path, for a program that runs in another directory."""
    return str(path.absolute())


def _extra(options: CollectOptions) -> list[str]:
    """The user's further options, with relative names of existing files made absolute: programs do not run in the user's
    directory, because llama.cpp loads backends from its working directory."""
    return [_path(Path(word)) if not word.startswith("-") and Path(word).is_file() else word for word in options.extra]


def _begins_at_the_beginning(why: str) -> UsageError:
    return UsageError(
        "llama-perplexity measures a text in one go, from its beginning",
        why,
        "Allow more disk with --max-disk, measure fewer chunks with --chunks, or use --engine embedded.",
    )


def _compute(tool: str, options: CollectOptions, tools: Toolchain, *, ends_texts: bool) -> list[str]:
    argv = [_known(tool, tools, "--override-kv"), f"{ADD_END}=bool:false"] if ends_texts else []
    argv += ["-c", str(options.n_ctx), "-b", str(options.n_batch), "-ub", str(options.n_ubatch)]
    if options.threads:
        argv += ["-t", str(options.threads)]
    if layers := _layers(tool, options, tools):
        argv += ["-ngl", layers]
    if tools.takes(tool).escapes:
        argv.append("--no-escape")  # a "\\n" written in the text is not a line break
    explicit = options.n_gpu_layers not in ("", "auto") or not tools.devices
    if explicit and tools.knows(tool, "-fit") and "-fit" not in options.extra:
        # Fitting to free memory may place layers differently from one range to the next; it also loads the model twice.
        argv += ["-fit", "off"]
    return argv + _placement(tool, options, tools)


def _layers(tool: str, options: CollectOptions, tools: Toolchain) -> str:
    """The value for ``-ngl`` in this tool's form; empty for its default."""
    if tools.takes(tool).named_layers:
        return options.n_gpu_layers
    return {"auto": "", "all": _ALL_LAYERS}.get(options.n_gpu_layers, options.n_gpu_layers)


def _placement(tool: str, options: CollectOptions, tools: Toolchain) -> list[str]:
    """Options for placement and memory, in the tool's own spelling."""
    argv: list[str] = []
    main_gpu = str(options.main_gpu) if options.main_gpu is not None else ""
    for names, values in (
        (("-ts", "--tensor-split"), (options.tensor_split,)),
        (("-sm", "--split-mode"), (options.split_mode,)),
        (("-mg", "--main-gpu"), (main_gpu,)),
        (("-ot", "--override-tensor"), options.override_tensors),
        (("-fa", "--flash-attn"), (_flash_attention(tool, options, tools),)),
    ):
        for value in filter(None, values):
            argv += [_known(tool, tools, *names), value]
    if options.flash_attn == "on" and _is_flag(tool, tools):
        argv.append("-fa")
    if not options.mmap:
        # Since 2026 loading has modes, and --no-mmap is gone.
        name = _known(tool, tools, "--no-mmap", "--load-mode")
        argv += [name, "none"] if name == "--load-mode" else [name]
    if not options.repack:
        argv.append(_known(tool, tools, "--no-repack"))
    return argv


def _flash_attention(tool: str, options: CollectOptions, tools: Toolchain) -> str:
    """The value for ``-fa``; empty where ``-fa`` is a flag (2024), whose absence means ``off``."""
    return "" if _is_flag(tool, tools) else options.flash_attn


def _is_flag(tool: str, tools: Toolchain) -> bool:
    return "-fa" in tools.takes(tool).flags


def _known(tool: str, tools: Toolchain, *names: str) -> str:
    """The first spelling that this tool knows."""
    for name in names:
        if tools.knows(tool, name):
            return name
    raise UsageError(
        f"This {tool} has no {names[0]}",
        f"the help of {tool} ({tools.identity()}, {tools.directory}) does not list {' or '.join(names)}",
        "Leave the option out, or build the current tools with: imatrix-runner tools build",
    )


def tokenize_command(model: Path, text: Path, tools: Toolchain, *, parse_special: bool) -> Command:
    """llama-tokenize, ids only: it reads the vocabulary, not the weights."""
    argv = [str(tools.tool("llama-tokenize")), "-m", _path(model), "-f", _path(text), "--ids"]
    if not tools.knows("llama-tokenize", "-f"):  # before June 2024 the text was an argument, whose length is limited
        raise ToolchainError(
            "These programs cannot count the tokens of a text",
            f"their tokenizer ({tools.tool('llama-tokenize')}) reads no files",
            "Use --engine embedded, or give an imatrix with --imatrix FILE.",
        )
    if tools.knows("llama-tokenize", "--no-escape"):
        argv.append("--no-escape")  # otherwise a "\n" written in the text becomes a line break, unlike in llama-imatrix
    if not parse_special and tools.knows("llama-tokenize", "--no-parse-special"):
        argv.append("--no-parse-special")
    return Command(tuple(argv))


def quantize_command(job: QuantizeJob, tools: Toolchain, *, dry_run: bool = False) -> Command:
    """llama-quantize for one level.

    It runs in the imatrix's directory and gets its bare name: the name goes into the output's metadata
    (``quantize.imatrix.file``), where the user's folders would be private and make equal jobs differ.
    """
    argv = [str(tools.tool("llama-quantize")), *_spelled(quantize_options(_taken(job.options, tools)), tools)]
    if job.imatrix is not None:
        argv += ["--imatrix", job.imatrix.name]
    if dry_run:
        argv.append("--dry-run")
    argv.append(_path(job.source))
    if not dry_run:
        argv.append(_path(job.out))
    argv.append(job.ftype)
    if job.threads:
        argv.append(str(job.threads))
    return Command(tuple(argv), cwd=job.imatrix.parent if job.imatrix is not None else None)


def split_command(job: QuantizeJob, tools: Toolchain) -> Command:
    """llama-gguf-split for a level that llama-quantize has written to ``out``; its shards lie next to it."""
    return Command((str(tools.tool(_SPLIT)), *split_words(job)))


def split_words(job: QuantizeJob) -> tuple[str, ...]:
    """The arguments of llama-gguf-split that cut ``out`` as the job's options want."""
    options = job.options
    size = options.split_max_size
    limit = ("--split-max-size", f"{size}M") if size is not None else ("--split-max-tensors", str(options.split_max_tensors))
    return ("--split", *limit, _path(job.out), _path(job.out.with_suffix("")))


def require_splitter(options: QuantizeOptions, tools: Toolchain) -> None:
    """Raise :class:`ToolchainError` if a level is to be cut into shards, and there is no program that does; :class:`UsageError`
    if that lacks the option."""
    if not options.is_split:
        return
    if _SPLIT not in tools.tools:
        raise ToolchainError(
            "Levels cannot be cut into shards",
            f"--split-max-size and --split-max-tensors need {_SPLIT}, and {tools.directory} has none that runs",
            "Build it with the other programs, or use --engine embedded, which writes shards itself.",
        )
    if _SPLIT in tools.options:
        _known(_SPLIT, tools, "--split-max-size" if options.split_max_size is not None else "--split-max-tensors")


def quantize_options(options: QuantizeOptions) -> list[str]:
    """The options of :class:`QuantizeOptions` as llama-quantize spells them, in a fixed order."""
    argv: list[str] = []
    for name, on in (
        ("--allow-requantize", options.allow_requantize),
        ("--leave-output-tensor", options.leave_output_tensor),
        ("--pure", options.pure),
        ("--keep-split", options.keep_split),
    ):
        if on:
            argv.append(name)
    for name, values in (
        ("--include-weights", options.include_weights),
        ("--exclude-weights", options.exclude_weights),
        ("--tensor-type", options.tensor_types),
        ("--override-kv", options.override_kv),
    ):
        for value in values:
            argv += [name, value]
    for name, single in (
        ("--output-tensor-type", options.output_tensor_type),
        ("--token-embedding-type", options.token_embedding_type),
        ("--tensor-type-file", _path(options.tensor_type_file) if options.tensor_type_file else ""),
        ("--prune-layers", options.prune_layers),
        ("--max-buffer-size", str(options.max_buffer_size) if options.max_buffer_size else ""),
    ):
        if single:
            argv += [name, single]
    for pin in options.pins:
        argv += ["--tensor-type", pin]
    return argv


_QUANTIZE = "llama-quantize"
_SPLIT = "llama-gguf-split"
_TENSOR_TYPE, _CUSTOM_TYPES = "--tensor-type", "--custom-q"
"""llama.cpp's option, and ik_llama.cpp's name for it."""


def _taken(options: QuantizeOptions, tools: Toolchain) -> QuantizeOptions:
    """The options that this llama-quantize has. Raises :class:`UsageError` if it lacks a requested one."""
    if _QUANTIZE not in tools.options:
        return options
    for names, wanted in (
        ((_TENSOR_TYPE, _CUSTOM_TYPES), options.tensor_types or options.pins),
        (("--tensor-type-file",), options.tensor_type_file),
        (("--prune-layers",), options.prune_layers),
        (("--keep-split",), options.keep_split),
        (("--include-weights",), options.include_weights),
        (("--exclude-weights",), options.exclude_weights),
        (("--output-tensor-type",), options.output_tensor_type),
        (("--token-embedding-type",), options.token_embedding_type),
        (("--override-kv",), options.override_kv),
    ):
        if wanted:
            _known(_QUANTIZE, tools, *names)
    # Without --max-buffer-size more memory is used, and the same bytes are written.
    return options if tools.knows(_QUANTIZE, "--max-buffer-size") else replace(options, max_buffer_size=None)


def _spelled(argv: Sequence[str], tools: Toolchain) -> Iterator[str]:
    """The options as programs without ``--tensor-type`` spell them: ``--custom-q``, and types in ggml's own case (``q4_K``)."""
    if _QUANTIZE not in tools.options or tools.knows(_QUANTIZE, _TENSOR_TYPE):
        yield from argv
        return
    before = ""
    for word in argv:
        if before == _TENSOR_TYPE:
            pattern, _, kind = word.rpartition("=")
            yield f"{pattern}={_as_ggml(kind)}"
        elif before in ("--output-tensor-type", "--token-embedding-type"):
            yield _as_ggml(word)
        else:
            yield _CUSTOM_TYPES if word == _TENSOR_TYPE else word
        before = word


def _as_ggml(kind: str) -> str:
    return re.sub(r"^(q\d)_k$", r"\1_K", kind.lower())
