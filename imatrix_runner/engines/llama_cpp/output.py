"""Parsers for what llama.cpp's programs print. They take text in blocks, as it comes through a pipe."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from imatrix_runner.engines.jobs import DryRun, Fallback

# tools/imatrix/imatrix.cpp: LOG("[%d]%.4lf,", chunk, ppl) on stdout, without line ends.
_CHUNK = re.compile(r"\[(\d{1,9})\]([-+\w.]{1,60}),")
_LOADED = "compute_imatrix: tokenizing the input"
_COMPUTING = re.compile(r"computing over (\d{1,9}) chunks\b")
# Releases of 2024 compute one chunk at a time, and some forks round the context up to a size that their kernels need.
_ONE_BY_ONE = re.compile(r"computing over \d+ chunks with batch_size")
_CONTEXT = re.compile(r"^llama_\w+ *: n_ctx +=? *(\d{1,9})$")
# LOG_DBGV(2, "%s[%d]: %32s, ..."), "collect_imatrix", last_chunk: the chunk being collected, at high verbosity.
_COLLECTING = re.compile(r"collect_imatrix\[(\d{1,9})\]:")

# src/llama-quant.cpp, one line a tensor, printed in blocks.
_TENSOR = re.compile(
    r"^\[\s*(?P<index>\d{1,9})/\s*(?P<total>\d{1,9})\]\s+(?P<name>\S.*?)\s+- "
    r"\[(?P<shape>\s*\d{1,15}(?:,\s*\d{1,15}){0,3})\s*\], type =\s*(?P<type>\S+),"
)
_CONVERTING = re.compile(r"converting to (\S+) \.\.")
_DRY_TYPE = re.compile(r"size =\s*[\d.]+ MiB ->\s*[\d.]+ MiB \((\S+)\)")
_SIZE = re.compile(r"size =\s*[\d.]+ Mi?B")
_FALLBACK = re.compile(
    r"warning: (\S.*?)\s+- ncols\s+\d+ not divisible by\s+\d+ \(required for type\s+(\S+)\).*-> falling back to\s+(\S+)"
)
# Before 2026, and in forks: without the tensor's name, which is in the line before.
_NAMELESS_FALLBACK = re.compile(r"tensor cols .*, required for (\S+)\s+- using fallback quantization (\S+)")
_NO_WEIGHTS = re.compile(r"did not find weights for (\S.*?)\s*$")
_NEEDS_IMATRIX = "will require an imatrix!"


class Lines:
    """Splits blocks into complete lines; ``partial`` is the beginning of the next one."""

    def __init__(self) -> None:
        self.partial = ""

    def feed(self, text: str) -> Iterator[str]:
        *whole, self.partial = (self.partial + text).split("\n")
        yield from (line.rstrip("\r") for line in whole)


@dataclass
class ImatrixOutput:
    """Parses the output of one llama-imatrix run. ``done`` counts finished chunks; ``ppl`` is the perplexity of the first
    ``ppl_chunks``. ``non_finite_at``: the first chunk, from 1, after which that was NaN or infinite; 0 if none was.
    ``chunk_size``: the size of a chunk where the program prints it."""

    done: int = 0
    ppl: float | None = None
    ppl_chunks: int = 0
    non_finite_at: int = 0
    loaded: bool = False
    n_chunks: int | None = None
    chunk_size: int | None = None
    _context: int | None = None
    _stdout: str = ""
    _stderr: Lines = field(default_factory=Lines)

    def feed(self, stream: str, text: str) -> bool:
        """Parse a block; true if a chunk, the perplexity or the loading state changed."""
        before = (self.done, self.ppl, self.loaded, self.chunk_size)
        if stream == "stdout":
            self._stdout += text
            for match in _COLLECTING.finditer(self._stdout):  # releases of 2024 print it here
                self.done = max(self.done, int(match[1]))
            for match in _CHUNK.finditer(self._stdout):
                self.done = self.ppl_chunks = int(match[1])
                self.ppl = _number(match[2])
                if not self.non_finite_at and not math.isfinite(self.ppl):
                    self.non_finite_at = self.done
            # Keep a possible beginning of the next "[n]ppl,".
            self._stdout = self._stdout[self._stdout.rfind("[") :] if "[" in self._stdout else ""
            if len(self._stdout) > 256 or _CHUNK.match(self._stdout):
                self._stdout = ""
        else:
            for line in self._stderr.feed(text):
                self._line(line)
        return (self.done, self.ppl, self.loaded, self.chunk_size) != before

    def _line(self, line: str) -> None:
        if _LOADED in line:
            self.loaded = True
        elif match := _COMPUTING.search(line):
            self.n_chunks = int(match[1])
            self.chunk_size = self._context if _ONE_BY_ONE.search(line) else None
        elif match := _CONTEXT.match(line):
            self._context = int(match[1])
        elif match := _COLLECTING.search(line):
            self.done = max(self.done, int(match[1]))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass
class QuantizeOutput:
    """Parses the output of one llama-quantize run, real or dry.

    ``elements`` counts the weights of finished tensors; ``tensor`` is the one being worked on.
    """

    elements: int = 0
    index: int = 0
    total: int = 0
    tensor: str = ""
    types: dict[str, str] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    without_weights: list[str] = field(default_factory=list)
    needs_imatrix: bool = False
    _lines: Lines = field(default_factory=Lines)
    _current: int = 0

    def feed(self, stream: str, text: str) -> bool:
        """Parse a block of stderr (stdout is ignored); true if a tensor began or ended."""
        if stream != "stderr":
            return False
        before = (self.index, self.elements)
        for line in self._lines.feed(text):
            self._line(line)
        if (match := _TENSOR.match(self._lines.partial)) and int(match["index"]) != self.index:
            self._begin(match)
        return (self.index, self.elements) != before

    def _line(self, line: str) -> None:
        if match := _TENSOR.match(line):
            if int(match["index"]) != self.index:
                self._begin(match)
            line = line[match.end() :]
        elif match := _FALLBACK.search(line):
            self.fallbacks.append(Fallback(match[1], match[2], match[3]))
        elif match := _NAMELESS_FALLBACK.search(line):
            self.fallbacks.append(Fallback(self.tensor, match[1], match[2]))
        elif match := _NO_WEIGHTS.search(line):
            self.without_weights.append(match[1])
        elif _NEEDS_IMATRIX in line:
            self.needs_imatrix = True
        if self._current:
            if match := _CONVERTING.search(line) or _DRY_TYPE.search(line):
                self.types[self.tensor] = match[1]
            if _SIZE.search(line):
                self.elements += self._current
                self._current = 0

    def _begin(self, match: re.Match[str]) -> None:
        self.index, self.total, self.tensor = int(match["index"]), int(match["total"]), match["name"]
        self._current = math.prod(int(extent) for extent in match["shape"].split(","))
        self.types[self.tensor] = match["type"]

    def as_dry_run(self) -> DryRun:
        return DryRun(dict(self.types), tuple(self.fallbacks), self.needs_imatrix)


def parse_token_ids(stdout: str, end: int | None = None) -> int:
    """Return the number of ids in llama-tokenize's ``--ids`` list, e.g. ``[1, 15043]``, without a last one equal to ``end``.

    Raises ``ValueError`` if there is no list.
    """
    begin, close = stdout.find("["), stdout.rfind("]")
    if begin < 0 or close < begin:
        raise ValueError("no list of token ids in the output")
    inside = stdout[begin + 1 : close].strip()
    count = inside.count(",") + 1 if inside else 0
    return count - 1 if count and inside.rpartition(",")[2].strip() == str(end) else count
