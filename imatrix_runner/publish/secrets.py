"""Looks for secrets, and for paths and names of this machine, in what is about to be published.

Findings say where, never what: a secret must not reach a log because it was found.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from imatrix_runner.environment import credentials
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models.gguf_file import MAGIC, read_header
from imatrix_runner.safe_text import shown

LeakKind = Literal["secret", "path", "name"]
"""``secret`` and ``path`` (of this machine) must not be published; a ``name`` of user or computer may be meant."""

MOST_FINDINGS = 50
"""Of one file."""

_TEMPLATE_KEY = "tokenizer.chat_template"
_WINDOW = 4 << 20
_OVERLAP = 8 << 10  # characters; longer than any secret that is looked for
_LEAST_SECRET, _LEAST_NAME = 12, 4
_COMMON_NAMES = frozenset(
    (
        *("root", "user", "users", "admin", "administrator", "ubuntu", "debian", "runner", "jovyan", "test", "model", "data"),
        *("localhost", "computer", "desktop", "server", "docker", "linux", "windows", "llama", "quant", "imatrix", "work"),
    )
)

_NOT_IN_WORD = r"(?<![A-Za-z0-9_])"
_SECRETS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (what, re.compile(_NOT_IN_WORD + pattern))
    for what, pattern in (
        ("a Hugging Face token", r"(?:hf|api_org)_[A-Za-z0-9]{30,}"),
        ("a GitHub token", r"(?:gh[opusr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})"),
        ("a GitLab token", r"glpat-[A-Za-z0-9_-]{20,}"),
        ("an AWS access key", r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
        ("an AWS secret key", r"(?i:aws_secret_access_key)[\"']?\s{0,3}[=:]\s{0,3}[\"']?[A-Za-z0-9/+]{40}"),
        ("an API key", r"sk-(?:[a-z]{2,12}-)?[A-Za-z0-9_-]{24,}"),
        ("a Google API key", r"AIza[A-Za-z0-9_-]{35}"),
        ("a Slack token", r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("a webhook's address", r"(?:discord(?:app)?\.com/api/webhooks|hooks\.slack\.com/services)/[A-Za-z0-9/_-]{20,}"),
        ("an npm token", r"npm_[A-Za-z0-9]{36,}"),
        ("a PyPI token", r"pypi-AgEI[A-Za-z0-9_-]{50,}"),
        ("a private key", r"-----BEGIN (?:[A-Z]{2,12} ){0,3}PRIVATE KEY"),
        ("a signed token (JWT)", r"eyJ[A-Za-z0-9_-]{16,}\.eyJ[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
        ("a bearer token", r"(?i:bearer)\s{1,3}[A-Za-z0-9._~+/-]{24,}"),
        ("a password in an address", r"[a-z][a-z0-9+.-]{1,15}://[^\s/:@\"'<>]{1,80}:[^\s/:@\"'<>]{3,200}@"),
    )
)
_HOMES = re.compile(
    r"(?<![A-Za-z0-9_.:/~-])(?:file://)?/(?:home/[^/\s\"'<>]{1,64}|Users/[^/\s\"'<>]{1,64}|root)/|[A-Za-z]:[\\/]{1,2}Users[\\/]"
)


@dataclass(frozen=True)
class LocalNames:
    """What is known of this machine: its ``folders``, ``names`` of user and computer, and ``secrets`` that it holds, such as
    the hub's token."""

    folders: tuple[str, ...]
    names: tuple[str, ...]
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leak:
    """Something in ``file`` at ``place`` (a line, a metadata key). ``what`` describes it, and does not quote it."""

    file: str
    place: str
    kind: LeakKind
    what: str

    def sentence(self) -> str:
        return f"{shown(self.file)}, {self.place}: {self.what}"


def local_names(*folders: Path, secrets: Sequence[str] = (), env: Mapping[str, str] | None = None) -> LocalNames:
    """This machine's names. ``folders``: further ones, such as the workspace and the source's; ``secrets``: further ones."""
    own = (Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *folders)
    paths = dict.fromkeys(str(each) for folder in own for each in (folder.absolute(), folder.resolve()))
    wide = {os.sep, *(str(Path(os.sep, name)) for name in ("tmp", "home", "root", "Users", "var", "mnt"))}
    held = (*secrets, *credentials(os.environ if env is None else env))
    return LocalNames(
        tuple(path for path in paths if path not in wide and len(path) >= _LEAST_NAME),
        tuple(dict.fromkeys(name for name in _own_names() if len(name) >= _LEAST_NAME and name.lower() not in _COMMON_NAMES)),
        tuple(dict.fromkeys(secret for secret in held if len(secret) >= _LEAST_SECRET)),
    )


def _own_names() -> Iterator[str]:
    with contextlib.suppress(OSError, KeyError):  # in a container, a user may have no name
        yield getpass.getuser()
    yield socket.gethostname().partition(".")[0]


def scan_file(path: Path, name: str, local: LocalNames) -> tuple[Leak, ...]:
    """What is found in a file that is to be published as ``name``: in the metadata of a GGUF, else in its text. Numbers of
    tensors are not looked at, nor vocabularies."""
    try:
        with path.open("rb") as handle:
            if handle.read(len(MAGIC)) == MAGIC:
                return scan_metadata(name, read_header(path).metadata, local)
            handle.seek(0)
            return _limited(_scan_stream(name, iter(lambda: handle.read(_WINDOW), b""), local))
    except OSError as error:
        raise from_os_error(error, "looking for secrets", path) from error


def scan_metadata(name: str, metadata: Mapping[str, Any], local: LocalNames) -> tuple[Leak, ...]:
    """What is found in the texts of a GGUF's metadata. Chat templates may speak of folders: in them, only this machine's
    count."""
    found: list[Leak] = []
    for key, value in metadata.items():
        texts = (
            [value]
            if isinstance(value, str)
            else [each for each in value if isinstance(each, str)]
            if isinstance(value, tuple)
            else []
        )
        homes = not key.startswith(_TEMPLATE_KEY)
        for text in (key, *texts):
            found += (
                Leak(name, f"metadata {shown(key, 80)}", kind, what) for kind, what, _ in _matches(text, local, homes=homes)
            )
    return _limited(found)


def scan_text(name: str, text: str, local: LocalNames) -> tuple[Leak, ...]:
    """What is found in a text, by line."""
    return _limited(_lines(name, text, local, 1))


def refuse_findings(findings: Sequence[Leak]) -> None:
    """Raise :class:`InvalidDataError` if something was found that must not be published."""
    bad = [each for each in findings if each.kind != "name"]
    if not bad:
        return
    shortened = [each.sentence() for each in bad[:5]]
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise InvalidDataError(
        "Nothing was uploaded: a file holds a secret or a path of this machine",
        "; ".join(shortened) + more,
        "Remove it from the file, or make the file again without it; a secret that was written to a file should be revoked.",
    )


def _scan_stream(name: str, blocks: Iterator[bytes], local: LocalNames) -> Iterator[Leak]:
    """Findings of a file's bytes, window by window; windows overlap, and what lies in both counts once."""
    before, line = "", 1
    for block in blocks:
        text = before + block.decode("utf-8", errors="replace")
        keep = max(0, len(text) - _OVERLAP)
        yield from _lines(name, text, local, line)
        line += text.count("\n", 0, keep)
        before = text[keep:]


def _lines(name: str, text: str, local: LocalNames, first: int) -> Iterator[Leak]:
    for kind, what, at in _matches(text, local, homes=True):
        yield Leak(name, f"line {first + text.count(chr(10), 0, at)}", kind, what)


def _matches(text: str, local: LocalNames, *, homes: bool) -> Iterator[tuple[LeakKind, str, int]]:
    """Kind, description and offset of everything in a text."""
    for secret in local.secrets:
        for match in re.finditer(re.escape(secret), text):
            yield "secret", "a secret of this machine's environment or of the hub's login", match.start()
    for what, pattern in _SECRETS:
        for match in pattern.finditer(text):
            yield "secret", what, match.start()
    for folder in local.folders:
        for match in re.finditer(re.escape(folder) + r"(?![A-Za-z0-9_.-])", text):
            yield "path", "a folder of this machine", match.start()
    if homes:
        for match in _HOMES.finditer(text):
            yield "path", "a path in a home folder", match.start()
    for each in local.names:
        for match in re.finditer(rf"(?<![A-Za-z0-9_]){re.escape(each)}(?![A-Za-z0-9_])", text, re.IGNORECASE):
            yield "name", "the name of this computer or its user", match.start()


def _limited(findings: Iterator[Leak] | Sequence[Leak]) -> tuple[Leak, ...]:
    distinct: dict[Leak, None] = {}
    for each in findings:
        distinct[each] = None
        if len(distinct) == MOST_FINDINGS:
            break
    return tuple(distinct)
