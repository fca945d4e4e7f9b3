"""``report.json`` as bytes and back."""

from __future__ import annotations

from pathlib import Path

import msgspec

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.files import encode_json
from imatrix_runner.models.bounded import printable
from imatrix_runner.report.document import SCHEMA, VERSION, Report
from imatrix_runner.untrusted import UnreadableError, from_json

MOST_BYTES = 64 << 20
"""A report of 512 tensors, 40 levels and 10,000 answers has a tenth of it."""


class _Envelope(msgspec.Struct, frozen=True):
    """What every version of a report begins to be known by."""

    schema: str = ""
    version: int = 0


def encode_report(report: Report) -> bytes:
    """JSON, indented by two, with a final newline; fractions as keys become strings."""
    return msgspec.json.format(encode_json(report), indent=2) + b"\n"


def read_report(path: Path) -> Report:
    """A report as it was written. Keys of later programs are passed over.

    Raises :class:`InvalidDataError` for what is no report, one of another version, or a damaged one.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise _bad(path, f"it is larger than {MOST_BYTES >> 20} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise from_os_error(error, "reading the report", path) from error
    try:
        envelope = from_json(content, _Envelope)
        if envelope.schema != SCHEMA:
            raise _bad(path, f"its schema is {printable(envelope.schema)[:80]!r}, not {SCHEMA}")
        if envelope.version != VERSION:
            raise _bad(path, f"it is of version {envelope.version}, and {VERSION} is known here")
        return from_json(content, Report)
    except UnreadableError as error:
        raise _bad(path, printable(str(error))[:300]) from error


def _bad(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(f"{path} is no report that can be read", why, "Make it again with: imatrix-runner report WORKSPACE")
