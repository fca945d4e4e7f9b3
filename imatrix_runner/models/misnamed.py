"""Guesses what was meant by a MODEL that is neither a path nor a hub id. Pure, except that it checks whether paths exist."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from imatrix_runner.bounded import quoted
from imatrix_runner.safe_text import printable
from imatrix_runner.untrusted import split_url

_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_PAGE = re.compile(
    rf"(?P<repo>{_ID})(?::[\w.-]+)?(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?/?", re.ASCII
)
_HOSTED = re.compile(r"[\w-]+(?:\.[\w-]+)+/(?P<path>[^/]+/[^/]+.*)", re.ASCII)
_TAGGED = re.compile(rf"(?P<repo>{_ID}):(?P<tag>[A-Za-z0-9_.-]+)", re.ASCII)
_INSIDE = re.compile(rf"(?P<repo>{_ID})/(?P<file>.+\.gguf)", re.ASCII | re.IGNORECASE)
_OLLAMA = re.compile(r"[\w.-]+:[\w.-]+", re.ASCII)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/].*|\\\\.+|[^/]*\\[^ ].*")
_FORMS = "Give a .gguf file, a Hugging Face directory, or a hub id: org/name, org/name@revision, org/name:file.gguf."


@dataclass(frozen=True)
class Meant:
    """``why`` the text does not name a model; ``todo``: what to do, often the command that was meant."""

    why: str
    todo: str


def meant(text: str) -> Meant:
    """The likeliest mistake in a text that does not name a source."""
    bare = text.strip().strip("\"'“”‘’").strip()
    if not bare:
        return Meant("the name is empty", _FORMS)
    if bare != text and (Path(bare).expanduser().exists() or re.fullmatch(_ID, bare)):
        return Meant("there are spaces or quotation marks around the name", f"Without them: {_run(bare)}")
    if "://" in bare or _hosted(bare):
        return _address(bare)
    if any(mark in bare for mark in "*?") and "/" not in bare.rpartition("*")[2]:
        return Meant("it is a pattern, and no file matches it", "Give one file; of a split model, its first shard.")
    if os.name != "nt" and _WINDOWS.fullmatch(bare):
        return _windows(bare)
    if match := _TAGGED.fullmatch(bare):
        why = f"a colon must be followed by a file, and {match['tag']!r} is a tag (as for llama.cpp's -hf or Ollama)"
        return Meant(why, f"Give the model in full precision, {_run(match['repo'])}, or a file: {match['repo']}:FILE.gguf")
    if match := _INSIDE.fullmatch(bare):
        why = f"there is no such path; a file of the hub's repository {match['repo']} is given after a colon"
        return Meant(why, f"If you mean that file: {_run(match['repo'] + ':' + match['file'])}")
    if _OLLAMA.fullmatch(bare):
        return Meant(
            "it looks like the name of an Ollama model, which this program cannot find",
            "Give the GGUF itself (`ollama show --modelfile NAME` prints its path after FROM) or a hub id (org/name).",
        )
    return Meant(_no_path(bare), _FORMS)


def _run(source: str) -> str:
    return f"imatrix-runner run {quoted(Path(source)) if '://' not in source else printable(source)}"


def _hosted(text: str) -> bool:
    """Whether it is a web address without a scheme: a host name, then at least org/name, and no folder of the host's name."""
    match = _HOSTED.fullmatch(text)
    return match is not None and _PAGE.fullmatch(match["path"]) is not None and not Path(text.partition("/")[0]).exists()


def _address(text: str) -> Meant:
    if text.lower().startswith("file://"):
        return Meant("a file is given by its path, not by a file:// address", f"Try: {_run(unquote(split_url(text).path))}")
    parts = split_url(text if "://" in text else f"https://{text}")
    path = unquote(parts.path if parts.scheme in ("http", "https") else f"{parts.netloc}{parts.path}").strip("/")
    match = _PAGE.fullmatch(path.removeprefix("models/"))
    why = "a web address is not a model source; a hub id is just org/name"
    if match is None:
        return Meant(why, _FORMS)
    revision = f"@{match['revision']}" if match["revision"] not in (None, "main") else ""
    file = match["file"] or ""
    named = f":{file}" if file.lower().endswith(".gguf") else ""
    return Meant(why, f"If you mean that page of a hub: {_run(match['repo'] + revision + named)}")


def _windows(text: str) -> Meant:
    path = PureWindowsPath(text)
    drive = path.drive.rstrip(":").lower()
    mounted = Path("/mnt", drive, *path.parts[1:])
    if len(drive) == 1 and Path("/mnt", drive).is_dir():
        return Meant("it is a Windows path, and this system is not Windows", f"Under WSL that is: {_run(str(mounted))}")
    return Meant("it is a Windows path, and this system is not Windows", f"Write it as this system does. {_FORMS}")


def _no_path(text: str) -> str:
    path = Path(text).expanduser()
    if not path.parent.is_dir():
        return f"neither a path that exists (there is no directory {printable(str(path.parent))}) nor a hub id"
    close = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.6)
    near = f" (did you mean {printable(close[0])}?)" if close else ""
    return f"no such file or directory{near}, and it is not a hub id (org/name) either"
