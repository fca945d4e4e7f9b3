"""Recognises files given as plain text that are something else, or contain records, and names the command that helps."""

from __future__ import annotations

import codecs
import io
import re
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.bounded import quoted
from imatrix_runner.documents.json_rows import is_jsonl
from imatrix_runner.documents.streams import OTHER_FORMATS

_SAMPLE, _LEAST_SAMPLE = 4096, 16
_ASCII_SHARE = 0.25
"""Share of zero bytes from which a file counts as UTF-16. In European languages nearly half of the bytes are zero, all at even
or all at odd offsets."""
_TABLES = {".csv": "CSV", ".tsv": "tab-separated values"}
_HEAD_OF_PAGE = re.compile(rb"\s*<(?:!doctype html|html|head)\b", re.IGNORECASE)
SINGLE_MESSAGES = "JSON lines, each a chat message"
WITH_MESSAGES = (SINGLE_MESSAGES, "JSON lines with chat messages")

_SINGLE = re.compile(rb'\s*\{\s*(?:"(?!messages|conversation)\w+"\s*:\s*"[^"]*"\s*,\s*)*"(?:role|from)"\s*:')
_ROLE = re.compile(rb'"(?:role|from)"\s*:\s*"')


@dataclass(frozen=True)
class NotText:
    """``why``: the reason why a file is not text, as a phrase; ``todo``: a sentence."""

    why: str
    todo: str


def not_text(path: Path, data: bytes, option: str) -> NotText | None:
    """Why the content of ``path``, given with ``option``, is not UTF-8 text; None if it is."""
    for magic, why, command in OTHER_FORMATS:
        if data.startswith(magic):
            return NotText(why, f"Convert it to text first: {command.format(quoted(path))}")
    if data.startswith(b"\x1f\x8b"):
        return NotText("it is compressed with gzip", f"Unpack it: gunzip --keep {quoted(path)}")
    if data.startswith(b"PAR1"):
        return NotText("it is a Parquet table", f"Build a text from its rows: {build_command(path)}")
    if data.startswith(b"GGUF"):
        return NotText(
            "it is a GGUF, a model or an imatrix (it contains NUL bytes)",
            f"Give a model as MODEL, an imatrix with --imatrix, and a UTF-8 text with {option}.",
        )
    if wide := _utf16(data):
        return NotText(f"it is UTF-16, without a byte order mark ({wide})", f"Convert it: {_iconv(path, wide)}")
    if b"\0" in data:
        return NotText("it is a binary file (it contains NUL bytes)", f"Give plain UTF-8 text with {option}.")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return _undecodable(path, data, error)
    return None


def records_in(path: Path, data: bytes) -> str:
    """What a text contains instead of running text, for people (``JSON lines``); empty if it is running text."""
    if is_jsonl(io.BytesIO(data)):
        if _SINGLE.match(data[:_SAMPLE].removeprefix(codecs.BOM_UTF8)):
            return SINGLE_MESSAGES
        return WITH_MESSAGES[1] if _ROLE.search(data[:_SAMPLE]) else "JSON lines"
    head = data[:_SAMPLE].removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith((b"[{", b'{"')) or re.match(rb'[\[{]\s+["{]', head):
        return "JSON"
    if _HEAD_OF_PAGE.match(head):
        return "HTML"
    kind = _TABLES.get(path.suffix.lower(), "")
    separator = b"\t" if kind.startswith("tab") else b","
    return kind if kind and separator in data.partition(b"\n")[0] else ""


def build_command(path: Path, model: Path | None = None) -> str:
    """The command that builds a calibration text from a file or folder of documents."""
    out = path.with_name(f"{path.stem}.txt")
    out = out if out.name != path.name else path.with_name(f"{path.stem}-built.txt")
    named = quoted(model) if model is not None else "MODEL"
    return f"imatrix-runner calibration build {quoted(path)} -o {quoted(Path(out.name))} --model {named}"


def _utf16(data: bytes) -> str:
    """``UTF-16LE`` or ``UTF-16BE`` if the data seems to be such text without a byte order mark; else empty."""
    sample = data[:_SAMPLE]
    for name, zeros, others in (("UTF-16LE", sample[1::2], sample[::2]), ("UTF-16BE", sample[::2], sample[1::2])):
        if len(sample) >= _LEAST_SAMPLE and zeros.count(0) > _ASCII_SHARE * len(sample) and not others.count(0):
            return name
    return ""


def _undecodable(path: Path, data: bytes, error: UnicodeDecodeError) -> NotText:
    where = f"byte {error.start} is not valid UTF-8"
    if len(data) - error.start < 4 and error.reason == "unexpected end of data" and error.start > 0:
        return NotText(
            f"{where}: it ends in the middle of a character, like a truncated file",
            f"Remove that end, for example: iconv -c -f utf-8 -t utf-8 {_redirected(path)}",
        )
    # 0x80 to 0x9f are control characters in Latin-1; in Windows-1252 they are quotation marks, dashes and the euro sign.
    windows = re.search(rb"[\x80-\x9f]", data) is not None
    name, shown = ("cp1252", "Windows-1252") if windows else ("latin1", "Latin-1")
    return NotText(where, f"Convert it, for example (if it is {shown}): iconv -f {name} -t utf-8 {_redirected(path)}")


def _iconv(path: Path, name: str) -> str:
    return f"iconv -f {name} -t UTF-8 {_redirected(path)}"


def _redirected(path: Path) -> str:
    return f"{quoted(Path(path.name))} > {quoted(Path(f'{path.stem}-utf8.txt'))}"
