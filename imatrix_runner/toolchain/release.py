"""Installs an official release archive of llama.cpp into the managed cache."""

from __future__ import annotations

import fnmatch
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from imatrix_runner import downloads
from imatrix_runner.errors import DownloadError, from_os_error
from imatrix_runner.events import Finished, Progress, Saved, Sink, Started, info
from imatrix_runner.files import part_path, publish, require_space, sha256
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.archive import ArchiveError, unpack
from imatrix_runner.toolchain.probe import NEEDED, Toolchain, executable
from imatrix_runner.toolchain.program_proof import warn_of_weakness
from imatrix_runner.toolchain.source import check_ref
from imatrix_runner.toolchain.store import BuildRecord, Store, cache_dir, now, safe_name
from imatrix_runner.untrusted import UnreadableError, as_type, from_lenient_json, split_url

RELEASES = "https://api.github.com/repos/ggml-org/llama.cpp/releases"

ENV_RELEASES = "IMATRIX_RUNNER_RELEASES_URL"

MAX_ARCHIVE = 6 << 30

_STEP = "install"

_BUILD = "Build from source: imatrix-runner tools build"

_NIGHTLY_FILE = "nightly-tag.txt"

_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64", "s390x": "s390x"}

_LINUX = {"cpu": "", "cuda": "cuda-*-", "vulkan": "vulkan-", "hip": "rocm-*-", "sycl": "sycl-fp32-"}

_WINDOWS = {"cpu": "cpu-", "cuda": "cuda-*-", "vulkan": "vulkan-", "hip": "rocm-*-", "sycl": "sycl-"}


@dataclass(frozen=True)
class InstallRequest:
    """What to install. ``tag`` None: the latest release. ``releases_url``: the API's address, for mirrors and tests."""

    tag: str | None = None
    backend: str = "cpu"
    force: bool = False
    cache: Path = field(default_factory=cache_dir)
    releases_url: str = field(default_factory=lambda: os.environ.get(ENV_RELEASES) or RELEASES)
    system: str = field(default_factory=platform.system)
    machine: str = field(default_factory=platform.machine)
    wait_seconds: float = 1.0


@dataclass(frozen=True)
class Asset:
    """A file of a release; ``sha256`` in hex, empty when the release announces none."""

    name: str
    size: int
    url: str
    sha256: str


@dataclass(frozen=True)
class Release:
    """A release, from its data on GitHub."""

    tag: str
    assets: tuple[Asset, ...]


def asset_name(tag: str, system: str, machine: str, backend: str) -> str:
    """Return a pattern for a platform's archive: ``llama-b9976-bin-ubuntu-cuda-*-x64.tar.gz`` (``*``: a toolkit version).

    ``system`` and ``machine`` as in :mod:`platform`.
    """
    cpu = _MACHINES.get(machine.lower())
    kinds = {"Linux": _LINUX, "Windows": _WINDOWS}.get(system)
    if cpu and kinds and backend in kinds:
        place, ending = ("ubuntu", "tar.gz") if system == "Linux" else ("win", "zip")
        return f"llama-{tag}-bin-{place}-{kinds[backend]}{cpu}.{ending}"
    # Apple's archives have both: Metal on Apple silicon, the processor everywhere.
    if cpu and system == "Darwin" and (backend == "cpu" or (backend == "metal" and cpu == "arm64")):
        return f"llama-{tag}-bin-macos-{cpu}.tar.gz"
    raise DownloadError(
        "llama.cpp releases have no archive for this machine",
        f"no {backend} archive is made for {system} on {machine}",
        f"Build it from source: imatrix-runner tools build --backend {backend}",
    )


def choose(release: Release, pattern: str) -> tuple[Asset, ...]:
    """Return the archive that matches ``pattern`` and, if there is one, the archive of the runtime libraries it needs.

    Of several toolkit versions the oldest is chosen: it works with the most drivers.
    """
    fitting = sorted((asset for asset in release.assets if fnmatch.fnmatchcase(asset.name, pattern)), key=_versions)
    if not fitting:
        there = ", ".join(sorted(asset.name for asset in release.assets if "-bin-" in asset.name)) or "no archives at all"
        raise DownloadError(
            f"Release {release.tag} has no archive for this machine",
            f"{pattern} is not among its files: {there}",
            f"Choose another --backend or --tag. {_BUILD}",
        )
    main = fitting[0]
    tail = main.name[main.name.index("-bin-") :]
    runtime = [asset for asset in release.assets if asset.name.startswith("cudart-") and asset.name.endswith(tail)]
    chosen = (main, *runtime[:1])
    for asset in chosen:
        if not asset.sha256:
            raise DownloadError(
                f"{asset.name} cannot be verified",
                "the release announces no SHA-256 digest for it",
                f"Choose a newer release with --tag. {_BUILD}",
            )
    return chosen


def _versions(asset: Asset) -> tuple[tuple[int, ...], str]:
    return tuple(int(number) for number in re.findall(r"\d+", asset.name.partition("-bin-")[2])), asset.name


def parse_release(data: Any, url: str) -> Release:
    """Parse a release from GitHub's JSON. Raises :class:`DownloadError` for anything else."""
    try:
        wire = as_type(data, _WireRelease)
    except UnreadableError as error:
        raise DownloadError("The list of releases could not be understood", f"{url}: {error}", _BUILD) from error
    return Release(wire.tag_name, tuple(Asset(a.name, a.size, a.browser_download_url, _sha256(a.digest)) for a in wire.assets))


def _sha256(digest: str | None) -> str:
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", (digest or "").lower())
    return match.group(1) if match else ""


_Name = Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,200}$")]


class _WireAsset(msgspec.Struct):
    name: _Name
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    browser_download_url: Annotated[str, msgspec.Meta(pattern=r"^https?://[\x21-\x7e]{1,2000}$")]
    digest: str | None = None


class _WireRelease(msgspec.Struct):
    tag_name: Annotated[str, msgspec.Meta(pattern=r"^[\w.+-]{1,100}$")]
    assets: list[_WireAsset]


def install(request: InstallRequest, runner: Runner, sink: Sink, env: Mapping[str, str] = os.environ) -> Toolchain:
    """Download, verify, unpack, check and store a release; one that fails on the way leaves nothing behind.

    Raises :class:`DownloadError`, ``NoSpaceError``, or ``ToolchainError`` when the binaries do not run here.
    """
    if request.tag is not None:
        check_ref(request.tag)
    fetcher = ReleaseFetcher(runner.stop, env, wait_seconds=request.wait_seconds)
    release = find_release(request, fetcher)
    assets = choose(release, asset_name(release.tag, request.system, request.machine, request.backend))
    store = Store(request.cache)
    key = safe_name(f"release-{release.tag}-{request.backend}")
    with store.locked(_STEP, runner.stop, sink):
        if not request.force and (ready := store.ready(key)):
            sink(info(f"Already installed: {ready.identity()} in {ready.directory}"))
            return ready
        began = time.monotonic()
        total = sum(asset.size for asset in assets)
        if total > MAX_ARCHIVE:
            raise DownloadError(
                f"{assets[0].name} is too large", f"{total} bytes are announced, and the limit is {MAX_ARCHIVE}", _BUILD
            )
        require_space(store.root, 4 * total, f"installing llama.cpp {release.tag}")
        sink(Started(_STEP, f"Installing llama.cpp {release.tag} ({assets[0].name})", total=total, unit="B"))
        archives = [store.downloads / safe_name(asset.name) for asset in assets]
        try:
            _download(assets, archives, total, fetcher, sink)
            toolchain = _store(archives, assets, release, request, key, store, runner.stop)
        except BaseException:
            sink(Finished(_STEP, "failed", release.tag, time.monotonic() - began))
            raise
        finally:
            for archive in archives:
                archive.unlink(missing_ok=True)
        sink(Saved(str(toolchain.directory), toolchain.identity()))
        if toolchain.converter is None:
            sink(info("Releases carry no converter for Hugging Face models; imatrix-runner tools build makes one."))
        sink(Finished(_STEP, "done", toolchain.identity(), time.monotonic() - began))
        warn_of_weakness(toolchain, store.root, sink)
        return toolchain


def find_release(request: InstallRequest, fetcher: ReleaseFetcher) -> Release:
    """Return the requested release. A version tag (v0.5.0) holds only the name of the build (b9976) whose release has the
    files."""
    release = _release(request, request.tag, fetcher)
    pointer = next((asset for asset in release.assets if asset.name == _NIGHTLY_FILE), None)
    if pointer is None:
        return release
    tag = fetcher.read(pointer.url, f"{release.tag}'s {_NIGHTLY_FILE}", limit=1024).decode("ascii", "replace").strip()
    if not re.fullmatch(r"b\d{1,9}", tag):
        raise DownloadError(f"Release {release.tag} points nowhere", f"its {_NIGHTLY_FILE} says {tag[:40]!r}", _BUILD)
    return _release(request, tag, fetcher)


def _release(request: InstallRequest, tag: str | None, fetcher: ReleaseFetcher) -> Release:
    url = f"{request.releases_url.rstrip('/')}/{f'tags/{tag}' if tag else 'latest'}"
    return parse_release(fetcher.json(url, f"llama.cpp's release {tag or '(latest)'}"), url)


def _download(assets: Sequence[Asset], archives: Sequence[Path], total: int, fetcher: ReleaseFetcher, sink: Sink) -> None:
    """Fetch each asset to its archive's name; one that a killed run left there is kept if its digest is the announced one."""
    before = 0
    for asset, final in zip(assets, archives, strict=True):
        if not (final.is_file() and sha256(final) == asset.sha256):
            _download_one(asset, final, fetcher, _progress_after(sink, before, total))
        before += asset.size


def _download_one(asset: Asset, final: Path, fetcher: ReleaseFetcher, on_bytes: Callable[[int], None]) -> None:
    part = part_path(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, "preparing the download", final) from error
    digest = fetcher.file(asset.url, asset.name, part, size=asset.size, on_bytes=on_bytes)
    if digest != asset.sha256:
        part.unlink(missing_ok=True)
        raise DownloadError(
            f"{asset.name} is not what was published",
            f"its SHA-256 is {digest}, the release announces {asset.sha256}",
            "Nothing was kept; try again, and suspect the network or mirror if it happens twice.",
        )
    publish(part, final)


def _progress_after(sink: Sink, before: int, total: int) -> Callable[[int], None]:
    return lambda done: sink(Progress(_STEP, before + done, total))


def _store(
    archives: Sequence[Path],
    assets: Sequence[Asset],
    release: Release,
    request: InstallRequest,
    key: str,
    store: Store,
    stop: Stop,
) -> Toolchain:
    with store.scratch(store.toolchains, key) as scratch:
        try:
            _assemble(archives, scratch, stop)
        except ArchiveError as error:
            raise DownloadError(f"{assets[0].name} cannot be used", str(error), _BUILD) from error
        except OSError as error:
            raise from_os_error(error, "unpacking the release", scratch) from error
        record = BuildRecord(
            key=key,
            kind="release",
            source=assets[0].url,
            version=release.tag,
            commit="",
            backend=request.backend,
            date=now(),
            sha256=assets[0].sha256,
        )
        return store.adopt(scratch, record, request.backend)


def _assemble(archives: Sequence[Path], scratch: Path, stop: Stop) -> None:
    """Unpack the programs' archive and put the runtime libraries next to them, in ``scratch/bin``."""
    home = scratch / "bin"
    for number, archive in enumerate(archives):
        into = scratch / f"unpacked-{number}"
        into.mkdir()
        unpack(archive, into, check=stop.check)
        if number == 0:
            _take_over(into, home)
        else:
            _merge(into, home)
        shutil.rmtree(into, ignore_errors=True)  # gone already where the archive had no folder of its own
    _require_links_inside(home)


def _take_over(unpacked: Path, final: Path) -> None:
    """Find the folder with the programs, wherever it is in the archive, and move it to ``final``."""
    wanted = executable(Path(), NEEDED[0]).name
    found = sorted(unpacked.rglob(wanted), key=lambda path: len(path.parts))
    if not found:
        raise ArchiveError(f"it holds no {wanted}")
    found[0].parent.replace(final)


def _merge(unpacked: Path, home: Path) -> None:
    """Put runtime libraries next to the programs."""
    for path in sorted(unpacked.rglob("*")):
        if path.is_symlink() or path.is_file():
            path.replace(home / path.name)


def _require_links_inside(home: Path) -> None:
    """Check that the links in the programs' folder, which was moved, lead to files in it."""
    root = home.resolve()
    for path in home.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ArchiveError(f"its link {path.name!r} leads outside the programs' folder")


_API_HOST = "api.github.com"

_MAX_JSON = 16 << 20

_LATER = "Try again later, or build from source: imatrix-runner tools build"

_ADVICE = downloads.DownloadAdvice(
    later=_LATER,
    unreachable="Check the network or the proxy (HTTPS_PROXY), or build from source: imatrix-runner tools build",
    missing="Look for the tag on llama.cpp's releases page, then give it with --tag.",
    refused="Set GITHUB_TOKEN to one of your tokens, or wait an hour, and try again.",
)


@dataclass(frozen=True)
class ReleaseFetcher:
    """Downloads by URL. ``wait_seconds`` is the pause before the second attempt; it doubles."""

    stop: Stop
    env: Mapping[str, str]
    timeout_seconds: float = 30.0
    wait_seconds: float = 1.0

    def json(self, url: str, what: str) -> Any:
        """Return a JSON document of a release service."""
        data = self.read(url, what, limit=_MAX_JSON)
        try:
            return from_lenient_json(data)
        except UnreadableError as error:
            raise DownloadError(
                f"{what} could not be read", f"{downloads.shown(url)} did not answer with JSON ({error})", _LATER
            ) from error

    def read(self, url: str, what: str, *, limit: int) -> bytes:
        """Return a small document of at most ``limit`` bytes."""
        return self._web.read(url, what, limit=limit)

    def file(self, url: str, what: str, part: Path, *, size: int, on_bytes: Callable[[int], None]) -> str:
        """Download exactly ``size`` bytes into ``part``; return their SHA-256 as hex. ``part`` is removed on any failure."""
        return self._web.file(url, what, part, size=size, on_bytes=on_bytes)

    @property
    def _web(self) -> downloads.Fetcher:
        return downloads.Fetcher(
            self.stop, _ADVICE, lambda url: headers_for(url, self.env), self.timeout_seconds, self.wait_seconds
        )


def headers_for(url: str, env: Mapping[str, str]) -> dict[str, str]:
    """Return the request headers. ``GITHUB_TOKEN`` is sent only to GitHub's API over HTTPS, also after redirects."""
    headers = {"User-Agent": "imatrix-runner", "Accept": "application/json, */*", "Accept-Encoding": "identity"}
    parts = split_url(url)
    if env.get("GITHUB_TOKEN") and parts.scheme == "https" and parts.hostname == _API_HOST and parts.port in (None, 443):
        headers["Authorization"] = f"Bearer {env['GITHUB_TOKEN']}"
    return headers
