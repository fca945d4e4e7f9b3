"""Fetches llama.cpp's source: from llama-cpp-python's source distribution, from a directory, or by git."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.environment import ChildNeeds
from imatrix_runner.errors import DownloadError, RunnerError, ToolchainError, UsageError, from_os_error
from imatrix_runner.events import Finished, Saved, Sink, Started
from imatrix_runner.files import atomic_writer, publish, sha256
from imatrix_runner.process import Command, Outcome, Runner, capture, relevant_lines
from imatrix_runner.toolchain.archive import MAX_BYTES, ArchiveError, opened_tar, unpack
from imatrix_runner.toolchain.store import Store, safe_name

PACKAGE = "llama-cpp-python"
TESTED_VERSION = "0.3.36"
KNOWN_SHA256 = {TESTED_VERSION: "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
"""Digests of source distributions; for other versions the first digest that was fetched is remembered next to the archive."""
UPSTREAM = "https://github.com/ggml-org/llama.cpp"
_STEP = "source"
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]{0,99}")
_PIP_VERSION = re.compile(r"[0-9][0-9A-Za-z.!+]{0,30}")
_UPSTREAM_COMMIT = re.compile(r"ggml-org/llama\.cpp@([0-9a-f]{7,40})")
_NETWORK = re.compile(
    r"name resolution|Connection (?:refused|reset|aborted)|timed out|Max retries|NewConnectionError|unable to access|"
    r"Could not resolve host|Network is unreachable|ProxyError|SSLError",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LlamaCppSource:
    """A llama.cpp tree to build, or the archive it is in.

    ``kind``: ``sdist``, ``directory`` or ``git``. ``tree`` is where the tree is, or will be after :func:`unpack_source`.
    ``version`` names it in the cache's key: llama-cpp-python's version, the tag, or llama.cpp's own.
    """

    kind: str
    version: str
    commit: str
    origin: str
    tree: Path
    sha256: str = ""
    archive: Path | None = None


def default_version() -> str:
    """The installed llama-cpp-python's version, so that bindings and binaries match; else the tested version."""
    try:
        return importlib.metadata.version(PACKAGE).partition("+")[0]  # an index's own build (+cu124) has the same source
    except importlib.metadata.PackageNotFoundError:
        return TESTED_VERSION


def fetch_sdist(version: str, store: Store, runner: Runner, sink: Sink) -> LlamaCppSource:
    """Fetch llama-cpp-python's source distribution with pip from its configured index, or use an earlier download."""
    if not _PIP_VERSION.fullmatch(version):
        raise UsageError(
            f"{version!r} is not a version", f"{PACKAGE} versions look like {TESTED_VERSION}", "Give such a version."
        )
    archive = store.downloads / f"llama_cpp_python-{version}.tar.gz"
    if not archive.is_file():
        _pip_download(version, archive, store, runner, sink)
    digest = sha256(archive)
    _check_digest(archive, version, digest)
    commit = _sdist_commit(archive)
    if version not in KNOWN_SHA256 and not _note(archive).is_file():
        with atomic_writer(_note(archive)) as handle:
            handle.write(f"{digest}\n".encode("ascii"))
    tree = store.sources / f"sdist-{safe_name(version)}-{digest[:12]}"
    return LlamaCppSource("sdist", version, commit, f"{PACKAGE} {version}", tree / "vendor" / "llama.cpp", digest, archive)


def _pip_download(version: str, archive: Path, store: Store, runner: Runner, sink: Sink) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ToolchainError(
            "The source cannot be fetched",
            f"this Python environment ({sys.prefix}) has no pip",
            f"Install it with: {sys.executable} -m ensurepip (or: uv pip install pip); or give a checkout with --source DIR.",
        )
    log = store.logs / f"download-{safe_name(version)}.log"
    sink(Started(_STEP, f"Fetching {PACKAGE} {version}'s source"))
    with store.scratch(store.downloads, f"sdist-{safe_name(version)}") as scratch:
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check")
        argv = (*pip, "--no-binary", PACKAGE, "--dest", str(scratch), f"{PACKAGE}=={version}")
        # In the scratch folder: -m looks for modules in the current directory first. pip's own temporary folders go there too,
        # so that a killed pip leaves nothing elsewhere. Preparing the metadata may need a compiler.
        places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
        command = Command(argv, cwd=scratch, env=places, needs=ChildNeeds.NETWORK | ChildNeeds.COMPILE)
        outcome = runner.run(command, log=log)
        found = sorted(scratch.glob("llama_cpp_python-*.tar.gz"))
        if not outcome.ok or not found:
            sink(Finished(_STEP, "failed", outcome.ending(), outcome.seconds))
            raise _pip_error(version, outcome, log)
        _check_digest(archive, version, sha256(found[0]), f"Check the index that pip uses. Log: {log}")
        publish(found[0], archive)
    sink(Saved(str(archive), f"source of {PACKAGE} {version}", archive.stat().st_size))
    sink(Finished(_STEP, "done", archive.name, outcome.seconds))


def _check_digest(archive: Path, version: str, digest: str, todo: str = "") -> None:
    """Raise :class:`ToolchainError` for a source distribution whose digest is not the known one."""
    note = _note(archive)
    known = KNOWN_SHA256.get(version)
    if known is None and note.is_file():
        known = note.read_text(encoding="ascii", errors="replace").strip()
    if known is not None and digest != known:
        raise ToolchainError(
            f"{archive.name} is not the source of {PACKAGE} {version}",
            f"its SHA-256 is {digest}, not {known}: it was damaged, or changed since it was published or first fetched",
            todo or f"Remove it, then run the same command again: rm {archive}{f' {note}' if note.is_file() else ''}",
        )


def _note(archive: Path) -> Path:
    """Return the file that remembers the digest of a source distribution."""
    return archive.with_name(f"{archive.name}.sha256")


def _pip_error(version: str, outcome: Outcome, log: Path) -> RunnerError:
    text = "\n".join(outcome.tail)
    what = f"{PACKAGE} {version}'s source could not be downloaded"
    if _NETWORK.search(text):
        return DownloadError(
            what, "pip could not reach its index", f"Check the network, or give a checkout with --source DIR. Log: {log}"
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return DownloadError(
            what,
            "pip's index offers no source of that version",
            f"Try the tested one with: --version {TESTED_VERSION}. Log: {log}",
        )
    lines = "\n".join(relevant_lines(outcome.tail))
    return DownloadError(what, f"pip ended with {outcome.ending()}:\n{lines}", f"Read the full log: {log}")


def _sdist_commit(archive: Path) -> str:
    """Return the first upstream commit in the distribution's change log; empty if it names none."""
    try:
        with opened_tar(archive) as tar:
            passed = 0
            for member in tar:
                passed += member.size
                if passed > MAX_BYTES:
                    break
                if member.name.count("/") == 1 and member.name.endswith("/CHANGELOG.md") and member.isreg():
                    handle = tar.extractfile(member)
                    text = handle.read(1 << 20).decode("utf-8", "replace") if handle else ""
                    match = _UPSTREAM_COMMIT.search(text)
                    return match.group(1) if match else ""
    except (ArchiveError, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise _bad_archive(archive, str(error)) from error
    return ""


def unpack_source(source: LlamaCppSource, store: Store, runner: Runner) -> None:
    """Make sure ``source.tree`` exists; an archive is unpacked whole or not at all."""
    if source.archive is None or source.tree.is_dir():
        return
    root = source.tree.parent.parent
    with store.scratch(store.sources, root.name) as scratch:
        try:
            unpack(source.archive, scratch, check=runner.stop.check)
            tops = [path for path in scratch.iterdir() if (path / "vendor" / "llama.cpp" / "CMakeLists.txt").is_file()]
            if not tops:
                raise _bad_archive(source.archive, "it holds no vendor/llama.cpp")
            tops[0].replace(root)
        except ArchiveError as error:
            raise _bad_archive(source.archive, str(error)) from error
        except OSError as error:
            raise from_os_error(error, "unpacking the source", root) from error


def _bad_archive(archive: Path, why: str) -> ToolchainError:
    return ToolchainError(f"{archive.name} cannot be used", why, f"Remove it, then run the same command again: rm {archive}")


def directory_source(directory: Path) -> LlamaCppSource:
    """Return the source in an existing checkout. It is only read; edits since the last build lead to a new build."""
    tree = directory.absolute()
    if not (tree / "CMakeLists.txt").is_file() or not any(
        (tree / place / "imatrix").is_dir() for place in ("tools", "examples")
    ):
        raise UsageError(
            f"{directory} is not a llama.cpp checkout",
            "a CMakeLists.txt and tools/imatrix should be there",
            "Give the top directory of llama.cpp's source with --source DIR.",
        )
    commit = _git_line(tree, "rev-parse", "--short=9", "HEAD") if (tree / ".git").exists() else None
    # Unchanged files of a commit are identified by it; any other tree by a digest of its files.
    clean = _git_line(tree, "status", "--porcelain", "--untracked-files=normal") == ""
    label = commit if commit and clean else f"{commit or 'tree'}-{_tree_digest(tree)}"
    return LlamaCppSource("directory", own_version(tree), label, str(tree), tree)


def own_version(tree: Path) -> str:
    """Return llama.cpp's own version from its CMakeLists.txt, or ``source`` for trees from before it had versions."""
    text = (tree / "CMakeLists.txt").read_text("utf-8", "replace")
    parts = [re.search(rf"set\(LLAMA_VERSION_{part}\s+(\d+)\)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part.group(1) for part in parts if part) or "source"


def _tree_digest(tree: Path) -> str:
    """Return eight digits that change when a file of the tree changes (by path, size and time, not by content)."""
    digest = hashlib.sha256()
    for folder, names, files in os.walk(tree):
        names[:] = sorted(name for name in names if name not in (".git", "__pycache__") and not name.startswith("build"))
        for name in sorted(files):
            path = Path(folder, name)
            at = path.lstat()
            digest.update(f"{path.relative_to(tree)}\0{at.st_size}\0{at.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:8]


def check_ref(ref: str) -> str:
    """Return ``ref`` if it can only be a tag or branch name, not an option or a path. Raises :class:`UsageError` otherwise."""
    if not _REF.fullmatch(ref) or ".." in ref or ref.endswith(("/", ".lock")):
        raise UsageError(f"{ref!r} is not a tag", "a tag looks like b9976 or v0.5.0", "Give a tag of llama.cpp with --ref TAG.")
    return ref


def git_source(ref: str, url: str, store: Store, runner: Runner, sink: Sink) -> LlamaCppSource:
    """Fetch a tag or branch of llama.cpp with ``git clone --depth 1``; a commit fetched before is not fetched again."""
    check_ref(ref)
    log = store.logs / f"clone-{safe_name(ref)}.log"
    names = (f"refs/tags/{ref}", f"refs/tags/{ref}^{{}}", f"refs/heads/{ref}")
    listed = _git(("ls-remote", "--", url, *names), runner, log, ref, url)
    by_name = {line.split()[1]: line.split()[0] for line in listed.tail if len(line.split()) == 2 and line.split()[1] in names}
    # An annotated tag is an object of its own; its peeled name (^{}) is the commit.
    commit = by_name.get(names[1]) or by_name.get(names[0]) or by_name.get(names[2])
    if commit is None:
        raise DownloadError(
            f"llama.cpp has no tag {ref}",
            f"{url} knows no tag or branch of that name",
            "Look for the tag on its releases page.",
        )
    tree = store.sources / f"git-{safe_name(ref)}-{commit[:9]}"
    if not tree.is_dir():
        sink(Started(_STEP, f"Cloning llama.cpp {ref}"))
        with store.scratch(store.sources, tree.name) as scratch:
            clone = ("clone", "--quiet", "--depth", "1", "--branch", ref, "--", url, str(scratch / "tree"))
            outcome = _git(clone, runner, log, ref, url)
            try:
                (scratch / "tree").replace(tree)
            except OSError as error:
                raise from_os_error(error, "storing the clone", tree) from error
        sink(Finished(_STEP, "done", f"{ref} {commit[:9]}", outcome.seconds))
    return LlamaCppSource("git", ref, commit[:9], f"{url} {ref}", tree)


_GIT_ENV: Mapping[str, str] = {
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
    "GIT_HTTP_LOW_SPEED_LIMIT": "1024",  # bytes a second, over a minute: otherwise a very slow server would block for ever
    "GIT_HTTP_LOW_SPEED_TIME": "60",
}


def _git(arguments: tuple[str, ...], runner: Runner, log: Path, ref: str, url: str) -> Outcome:
    outcome = runner.run(Command(("git", *arguments), env=_GIT_ENV, needs=ChildNeeds.NETWORK), log=log)
    if outcome.ok:
        return outcome
    lines = "\n".join(relevant_lines(outcome.tail))
    network = _NETWORK.search(lines)
    raise DownloadError(
        f"llama.cpp {ref} could not be fetched from {url}",
        "the network did not answer" if network else f"git ended with {outcome.ending()}:\n{lines}",
        f"Check the network and the tag, or give a checkout with --source DIR. Log: {log}",
    )


def _git_line(tree: Path, *arguments: str) -> str | None:
    """Return git's output about a checkout, without writing to it; None if git is missing, slow or distrusts the directory."""
    try:
        argv = ("git", "--no-optional-locks", "-C", str(tree), *arguments)
        answer = capture(Command(argv, env=_GIT_ENV, needs=ChildNeeds.NOTHING), seconds=30)
    except (OSError, TimeoutError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
