"""The real binaries: what a probe reads from them, what becomes of a damaged copy, and releases served by a real server.

Nothing here is compiled: the binaries are those of the toolchain that is there.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from imatrix_runner.errors import DownloadError, InterruptedRunError, NoSpaceError, ToolchainError
from imatrix_runner.events import Event, Finished, Notice, Progress, Saved, Started
from imatrix_runner.files import read_json
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain import release as releases
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import TOOLS, Rejected, Toolchain, probe
from imatrix_runner.toolchain.release import InstallRequest, asset_name, install
from imatrix_runner.toolchain.store import RECORD, BuildRecord

TAG = "b4242"


# What a probe reads


def test_a_probe_reads_the_real_tools(toolchain: Toolchain) -> None:
    assert set(toolchain.tools) == set(TOOLS)
    names = [entry.name for entry in toolchain.types]
    for name in ("Q4_0", "IQ2_XXS", "Q3_K_S", "Q4_K_M", "Q8_0", "F16", "BF16", "F32", "COPY"):
        assert name in names
    assert len(names) == len(set(names))
    by_name = {entry.name: entry for entry in toolchain.types}
    assert (by_name["Q4_K_M"].number, by_name["F32"].number, by_name["COPY"].number) == (15, 0, None)
    assert by_name["Q4_K"].alias_of == "Q4_K_M"
    for tool, option in (
        ("llama-imatrix", "--output-frequency"),
        ("llama-imatrix", "-ofreq"),
        ("llama-imatrix", "-ngl"),
        ("llama-imatrix", "--show-statistics"),
        ("llama-quantize", "--tensor-type-file"),
        ("llama-quantize", "--dry-run"),
        ("llama-tokenize", "--ids"),
        ("llama-perplexity", "--kl-divergence"),
        ("llama-gguf-split", "--split-max-size"),
    ):
        assert toolchain.knows(tool, option), (tool, option)
    assert not toolchain.knows("llama-imatrix", "--no-such-option")
    assert toolchain.version != "unknown"
    assert toolchain.commit
    assert toolchain.backends[0] == "cpu"


def test_a_copy_without_its_libraries_is_refused_with_the_librarys_name(toolchain: Toolchain, tmp_path: Path) -> None:
    for tool, path in toolchain.tools.items():
        shutil.copy2(path, tmp_path / tool)
    with pytest.raises(Rejected) as caught:
        probe(tmp_path, "test")
    assert "shared library" in caught.value.why
    assert "is missing" in caught.value.why


def test_a_torn_binary_is_refused(toolchain: Toolchain, tmp_path: Path) -> None:
    shutil.copytree(toolchain.directory, tmp_path / "bin", symlinks=True)
    whole = (tmp_path / "bin" / "llama-tokenize").read_bytes()
    (tmp_path / "bin" / "llama-tokenize").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(Rejected, match="llama-tokenize"):
        probe(tmp_path / "bin", "test")


def test_a_moved_toolchain_still_runs(toolchain: Toolchain, tmp_path: Path) -> None:
    shutil.copytree(toolchain.directory, tmp_path / "elsewhere", symlinks=True)
    assert probe(tmp_path / "elsewhere", "test").identity() == toolchain.identity()


# Releases


@dataclass
class Site:
    """A release service: what each path answers. ``cut``: bytes after which the connection breaks."""

    url: str = ""
    pages: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def release(self, path: str, tag: str, *assets: tuple[str, bytes, str | None]) -> None:
        """Publish a release; a digest None is the right one."""
        listed = []
        for name, data, digest in assets:
            self.pages[f"/files/{tag}/{name}"] = data
            right = "sha256:" + hashlib.sha256(data).hexdigest()
            entry: dict[str, object] = {"name": name, "size": len(data), "digest": right if digest is None else digest}
            listed.append(entry | {"browser_download_url": f"{self.url}/files/{tag}/{name}"})
        self.pages[path] = json.dumps({"tag_name": tag, "assets": listed, "body": "more than we read"}).encode()


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append((self.path, dict(self.headers)))
            status, headers = served.statuses.get(self.path, (200 if self.path in served.pages else 404, {}))
            data = served.pages.get(self.path, b"{}")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            cuts = served.cut.get(self.path)
            self.wfile.write(data[: cuts.pop(0)] if cuts else data)

        def log_message(self, *args: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield served
        server.shutdown()


Edit = Callable[[tarfile.TarFile], None]


def packed(toolchain: Toolchain, edit: Edit | None = None, top: str = f"llama-{TAG}") -> bytes:
    """The real binaries as a release archive has them: one folder, links kept."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        archive.add(toolchain.directory, top)
        if edit:
            edit(archive)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def archive(toolchain: Toolchain) -> bytes:
    return packed(toolchain)


@pytest.fixture
def request_for(site: Site, tmp_path: Path) -> Callable[..., InstallRequest]:
    def make(**changes: object) -> InstallRequest:
        usual: dict[str, object] = {"cache": tmp_path / "cache", "releases_url": f"{site.url}/releases", "wait_seconds": 0.01}
        return InstallRequest(**{**usual, **changes})  # type: ignore[arg-type]

    return make


NAME = asset_name(TAG, platform.system(), platform.machine(), "cpu")
FILE = f"/files/{TAG}/{NAME}"


def left(cache: Path) -> list[str]:
    """Files that an unsuccessful installation left, locks aside."""
    return [str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def refused(request: InstallRequest, kind: type[Exception] = DownloadError) -> DownloadError:
    with pytest.raises(kind) as caught:
        install(request, Runner(), lambda event: None, env={})
    assert left(request.cache) == []
    assert isinstance(caught.value, DownloadError | ToolchainError | NoSpaceError | InterruptedRunError)
    return caught.value  # type: ignore[return-value]


def test_the_latest_release_is_installed_once(
    site: Site, toolchain: Toolchain, archive: bytes, request_for: Callable[..., InstallRequest]
) -> None:
    site.release("/releases/latest", TAG, (NAME, archive, None), ("llama-other-bin-win-cpu-x64.zip", b"x", None))
    events: list[Event] = []
    request = request_for()
    made = install(request, Runner(), events.append, env={"GITHUB_TOKEN": "secret"})
    assert made.identity() == toolchain.identity()
    assert made.directory == request.cache / "toolchains" / f"release-{TAG}-cpu" / "bin"
    record = read_json(made.directory.parent / RECORD, BuildRecord)
    assert (record.kind, record.version, record.sha256) == ("release", TAG, hashlib.sha256(archive).hexdigest())
    assert [type(event) for event in events if not isinstance(event, Progress)] == [Started, Saved, Notice, Finished]
    progress = [event for event in events if isinstance(event, Progress)]
    assert (progress[-1].done, progress[-1].total) == (len(archive), len(archive))
    assert left(request.cache / "downloads") == []
    assert require(locate(None, env={}, cache=request.cache)) == made
    # A token is GitHub's alone.
    assert "secret" not in str(site.asked)
    site.asked.clear()
    assert install(request, Runner(), lambda event: None, env={}) == made
    assert [path for path, _ in site.asked] == ["/releases/latest"]


def test_a_version_tag_points_to_its_build(site: Site, archive: bytes, request_for: Callable[..., InstallRequest]) -> None:
    site.release("/releases/tags/v0.5.0", "v0.5.0", ("nightly-tag.txt", f"{TAG}\n".encode(), None))
    site.release(f"/releases/tags/{TAG}", TAG, (NAME, archive, None))
    made = install(request_for(tag="v0.5.0"), Runner(), lambda event: None, env={})
    assert made.directory.parent.name == f"release-{TAG}-cpu"
    site.release("/releases/tags/v0.6.0", "v0.6.0", ("nightly-tag.txt", b"../../evil", None))
    with pytest.raises(DownloadError, match="points nowhere"):
        install(request_for(tag="v0.6.0"), Runner(), lambda event: None, env={})


def test_a_zip_for_windows_is_unpacked_the_same(
    site: Site, toolchain: Toolchain, request_for: Callable[..., InstallRequest]
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for path in toolchain.directory.iterdir():
            info = zipfile.ZipInfo(path.name)
            info.external_attr = 0o100755 << 16
            zipped.writestr(info, path.read_bytes())
    site.release("/releases/latest", TAG, (f"llama-{TAG}-bin-win-cpu-x64.zip", buffer.getvalue(), None))
    made = install(request_for(system="Windows", machine="AMD64"), Runner(), lambda event: None, env={})
    assert made.identity() == toolchain.identity()


def test_runtime_libraries_are_laid_beside(site: Site, archive: bytes, request_for: Callable[..., InstallRequest]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as runtime:
        for name in ("cudart/lib/libcudart.so.12", "cudart/lib/libggml-cuda.so"):
            info = tarfile.TarInfo(name)
            info.size = 1
            runtime.addfile(info, io.BytesIO(b"x"))
    main = f"llama-{TAG}-bin-ubuntu-cuda-12.8-x64.tar.gz"
    site.release("/releases/latest", TAG, (main, archive, None), (f"cudart-{main}", buffer.getvalue(), None))
    made = install(request_for(backend="cuda", system="Linux", machine="x86_64"), Runner(), lambda event: None, env={})
    assert (made.directory / "libcudart.so.12").is_file()
    assert made.backends == ("cpu", "cuda")


def test_a_release_for_a_gpu_without_its_backend_is_refused(
    site: Site, archive: bytes, request_for: Callable[..., InstallRequest]
) -> None:
    site.release("/releases/latest", TAG, (f"llama-{TAG}-bin-ubuntu-vulkan-x64.tar.gz", archive, None))
    error = refused(request_for(backend="vulkan", system="Linux", machine="x86_64"), ToolchainError)
    assert "no vulkan backend" in error.what


@pytest.mark.parametrize(
    ("digest", "why"),
    [
        ("sha256:" + "0" * 64, "announces 0000"),
        ("", "no SHA-256"),
        ("md5:" + "0" * 32, "no SHA-256"),
        ("sha256:12", "no SHA-256"),
    ],
)
def test_a_wrong_or_missing_digest_leaves_nothing(
    site: Site, archive: bytes, request_for: Callable[..., InstallRequest], digest: str, why: str
) -> None:
    site.release("/releases/latest", TAG, (NAME, archive, digest))
    assert why in refused(request_for()).why


def test_a_cut_connection_is_tried_again(site: Site, archive: bytes, request_for: Callable[..., InstallRequest]) -> None:
    site.release("/releases/latest", TAG, (NAME, archive, None))
    site.cut[FILE] = [1000, len(archive) // 2]
    install(request_for(), Runner(), lambda event: None, env={})
    assert [path for path, _ in site.asked].count(FILE) == 3


def test_a_connection_cut_every_time_leaves_nothing(
    site: Site, archive: bytes, request_for: Callable[..., InstallRequest]
) -> None:
    site.release("/releases/latest", TAG, (NAME, archive, None))
    site.cut[FILE] = [1000] * 9
    assert "cut off" in refused(request_for()).what


def test_an_archive_shorter_or_longer_than_announced(
    site: Site, archive: bytes, request_for: Callable[..., InstallRequest]
) -> None:
    site.release("/releases/latest", TAG, (NAME, archive, None))
    site.pages[FILE] = archive[:-1000]
    assert "bytes arrived" in refused(request_for()).why
    site.pages[FILE] = archive + b"more"
    assert "larger than announced" in refused(request_for()).what


def test_a_truncated_archive_with_a_matching_digest(
    site: Site, archive: bytes, request_for: Callable[..., InstallRequest]
) -> None:
    site.release("/releases/latest", TAG, (NAME, archive[: len(archive) // 2], None))
    assert "damaged or cut short" in refused(request_for()).why


def _escape(archive: tarfile.TarFile) -> None:
    archive.addfile(tarfile.TarInfo("../../escaped"))


def _link(archive: tarfile.TarFile, name: str, target: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    archive.addfile(info)


@pytest.mark.parametrize(
    "edit",
    [
        _escape,
        lambda archive: _link(archive, f"llama-{TAG}/etc", "/etc"),
        lambda archive: _link(archive, f"llama-{TAG}/up", "../.."),
        # Inside the archive, but outside once the programs' folder is moved to its place.
        lambda archive: _link(archive, f"llama-{TAG}/up", "../beside"),
    ],
    ids=["path-out", "absolute-link", "relative-link", "link-beside"],
)
def test_an_archive_that_leads_out_leaves_nothing(
    site: Site, toolchain: Toolchain, request_for: Callable[..., InstallRequest], edit: Edit, tmp_path: Path
) -> None:
    site.release("/releases/latest", TAG, (NAME, packed(toolchain, edit), None))
    assert "outside" in refused(request_for()).why
    assert not list(tmp_path.rglob("escaped"))


def test_an_archive_without_the_programs_or_with_broken_ones(
    site: Site, toolchain: Toolchain, request_for: Callable[..., InstallRequest], tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as only_libraries:
        only_libraries.add(next(toolchain.directory.glob("lib*")), "llama/lib.so")
    site.release("/releases/latest", TAG, (NAME, buffer.getvalue(), None))
    assert "holds no llama-imatrix" in refused(request_for()).why

    for tool in TOOLS:
        shutil.copy2(toolchain.tools[tool], tmp_path / tool)
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as no_libraries:
        for tool in TOOLS:
            no_libraries.add(tmp_path / tool, f"llama/{tool}")
    site.release("/releases/latest", TAG, (NAME, buffer.getvalue(), None))
    assert "is missing" in refused(request_for(), ToolchainError).why


def test_every_refusal_of_the_service_in_its_own_words(
    site: Site, request_for: Callable[..., InstallRequest], tmp_path: Path
) -> None:
    assert "does not exist" in refused(request_for(tag="b1")).what
    site.statuses["/releases/latest"] = (403, {"x-ratelimit-remaining": "0"})
    limited = refused(request_for())
    assert "hourly limit" in limited.why
    assert "GITHUB_TOKEN" in limited.todo
    site.statuses["/releases/latest"] = (403, {})
    assert "access is refused" in refused(request_for()).why
    site.asked.clear()
    site.statuses["/releases/latest"] = (503, {})
    assert "answered 503" in refused(request_for()).why
    assert len(site.asked) == 3
    site.statuses.clear()
    site.pages["/releases/latest"] = b"<html>"
    assert "JSON" in refused(request_for()).why
    site.pages["/releases/latest"] = b'{"tag_name": "b1", "assets": []}'
    assert "no archives at all" in refused(request_for()).why
    site.release("/releases/latest", TAG, ("llama-b4242-bin-ubuntu-mips.tar.gz", b"x", None))
    assert "llama-b4242-bin-ubuntu-mips.tar.gz" in refused(request_for()).why


def test_no_network(request_for: Callable[..., InstallRequest]) -> None:
    error = refused(request_for(releases_url="http://127.0.0.1:9/releases"))
    assert "no connection to 127.0.0.1:9" in error.why
    assert error.exit_code == 4


def test_a_missing_file_and_a_file_elsewhere(site: Site, archive: bytes, request_for: Callable[..., InstallRequest]) -> None:
    site.release("/releases/latest", TAG, (NAME, archive, None))
    site.statuses[FILE] = (404, {})
    assert "does not exist" in refused(request_for()).what
    site.pages["/releases/latest"] = site.pages["/releases/latest"].replace(f"{site.url}/files".encode(), b"file:///files")
    assert "browser_download_url" in refused(request_for()).why
    # A redirect, as GitHub answers every download with, is followed.
    site.release("/releases/latest", TAG, (NAME, archive, None))
    site.pages["/elsewhere"] = archive
    site.statuses[FILE] = (302, {"Location": f"{site.url}/elsewhere"})
    assert install(request_for(), Runner(), lambda event: None, env={}).directory.is_dir()


def test_no_space_and_a_stop_leave_nothing(
    site: Site, archive: bytes, request_for: Callable[..., InstallRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.release("/releases/latest", TAG, (NAME, archive, None))
    request, stop = request_for(), Stop()
    with pytest.raises(InterruptedRunError):
        install(request, Runner(stop), lambda event: stop.request() if isinstance(event, Progress) else None, env={})
    assert left(request.cache) == []
    monkeypatch.setattr(releases, "require_space", lambda path, need, what: (_ for _ in ()).throw(NoSpaceError("a", "b", "c")))
    refused(request, NoSpaceError)
