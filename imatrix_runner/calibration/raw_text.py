"""Files given as plain text that are none, or that hold records of a data set: what they are and which command helps."""

from __future__ import annotations

import codecs
import io
import re
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.calibration.json_rows import is_jsonl
from imatrix_runner.calibration.streams import OTHER_FORMATS
from imatrix_runner.models.bounded import quoted

_SAMPLE, _LEAST_SAMPLE = 4096, 16
_ASCII_SHARE = 0.25
"""Of UTF-16 in a European language nearly half of the bytes are zero, all at even or all at odd places."""
_TABLES = {".csv": "CSV", ".tsv": "tab-separated values"}
_HEAD_OF_PAGE = re.compile(rb"\s*<(?:!doctype html|html|head)\b", re.IGNORECASE)
SINGLE_MESSAGES = "JSON lines, each a chat message"
WITH_MESSAGES = (SINGLE_MESSAGES, "JSON lines with chat messages")

_SINGLE = re.compile(rb'\s*\{\s*(?:"(?!messages|conversation)\w+"\s*:\s*"[^"]*"\s*,\s*)*"(?:role|from)"\s*:')
_ROLE = re.compile(rb'"(?:role|from)"\s*:\s*"')


@dataclass(frozen=True)
class NoText:
    """``why`` a file is no text, as the end of "it cannot be used"; ``todo``: a sentence."""

    why: str
    todo: str


def no_text(path: Path, data: bytes, option: str) -> NoText | None:
    """Why the content of ``path``, which is given with ``option``, is no UTF-8 text; None if it is one."""
    for magic, why, command in OTHER_FORMATS:
        if data.startswith(magic):
            return NoText(why, f"Make a text of it first: {command.format(quoted(path))}")
    if data.startswith(b"\x1f\x8b"):
        return NoText("it is compressed with gzip", f"Unpack it: gunzip --keep {quoted(path)}")
    if data.startswith(b"PAR1"):
        return NoText("it is a Parquet table", f"Build a text from its rows: {build_command(path)}")
    if data.startswith(b"GGUF"):
        return NoText(
            "it is a GGUF, a model or an imatrix (it holds NUL bytes)",
            f"Give a model as MODEL, an imatrix with --imatrix, and a UTF-8 text with {option}.",
        )
    if wide := _utf16(data):
        return NoText(f"it is UTF-16, without a byte order mark ({wide})", f"Convert it: {_iconv(path, wide)}")
    if b"\0" in data:
        return NoText("it is a binary file (it holds NUL bytes)", f"Give plain UTF-8 text with {option}.")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return _undecodable(path, data, error)
    return None


def records_in(path: Path, data: bytes) -> str:
    """What a text holds in place of running text, for people (``JSON lines``), or an empty text."""
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
    """The command that makes a calibration text of a file or folder of documents."""
    out = path.with_name(f"{path.stem}.txt")
    out = out if out.name != path.name else path.with_name(f"{path.stem}-built.txt")
    named = quoted(model) if model is not None else "MODEL"
    return f"imatrix-runner calibration build {quoted(path)} -o {quoted(Path(out.name))} --model {named}"


def _utf16(data: bytes) -> str:
    """``UTF-16LE`` or ``UTF-16BE`` for text in it that has no byte order mark."""
    sample = data[:_SAMPLE]
    for name, zeros, others in (("UTF-16LE", sample[1::2], sample[::2]), ("UTF-16BE", sample[::2], sample[1::2])):
        if len(sample) >= _LEAST_SAMPLE and zeros.count(0) > _ASCII_SHARE * len(sample) and not others.count(0):
            return name
    return ""


def _undecodable(path: Path, data: bytes, error: UnicodeDecodeError) -> NoText:
    where = f"byte {error.start} is not valid UTF-8"
    if len(data) - error.start < 4 and error.reason == "unexpected end of data" and error.start > 0:
        return NoText(
            f"{where}: it ends in the middle of a character, as a file that was cut does",
            f"Remove that end, for example: iconv -c -f utf-8 -t utf-8 {_redirected(path)}",
        )
    # 0x80 to 0x9f are control characters in Latin-1, and quotation marks, dashes and the euro sign in Windows' code page.
    windows = re.search(rb"[\x80-\x9f]", data) is not None
    name, shown = ("cp1252", "Windows-1252") if windows else ("latin1", "Latin-1")
    return NoText(where, f"Convert it, for example (if it is {shown}): iconv -f {name} -t utf-8 {_redirected(path)}")


def _iconv(path: Path, name: str) -> str:
    return f"iconv -f {name} -t UTF-8 {_redirected(path)}"


def _redirected(path: Path) -> str:
    return f"{quoted(Path(path.name))} > {quoted(Path(f'{path.stem}-utf8.txt'))}"
