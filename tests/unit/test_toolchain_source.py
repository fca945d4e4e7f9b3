"""Archives from outside, and where source comes from."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from imatrix_runner.errors import DownloadError, InterruptedRunError, ToolchainError, UsageError
from imatrix_runner.process import Command, Outcome, Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain import source as sources
from imatrix_runner.toolchain.archive import ArchiveError, unpack
from imatrix_runner.toolchain.source import (
    KNOWN_SHA256,
    TESTED_VERSION,
    check_ref,
    default_version,
    directory_source,
    fetch_sdist,
    own_version,
    unpack_source,
)
from imatrix_runner.toolchain.store import Store


def member(name: str, data: bytes = b"", **kind: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o755
    for key, value in kind.items():
        setattr(info, key, value)
    return info, data


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=kind, linkname=target)


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def test_files_links_and_modes_come_out_as_they_went_in(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a.tar.gz",
        member("top/lib/libx.so.1", b"x"),
        link("top/lib/libx.so", "libx.so.1"),
        link("top/bin/libx.so", "../lib/libx.so.1"),
        link("top/lib/hard", "top/lib/libx.so.1", tarfile.LNKTYPE),
    )
    out = tmp_path / "out"
    out.mkdir()
    unpack(archive, out)
    assert (out / "top/bin/libx.so").read_bytes() == (out / "top/lib/hard").read_bytes() == b"x"
    assert (out / "top/lib/libx.so").is_symlink()
    assert (out / "top/lib/libx.so.1").stat().st_mode & 0o100


@pytest.mark.parametrize(
    "members",
    [
        [member("../evil", b"x")],
        [member("/tmp/evil", b"x")],
        [member("a/../../evil", b"x")],
        [member("a\\..\\..\\evil", b"x")],
        [member("C:/evil", b"x")],
        [link("out", "/etc")],
        [link("out", "..")],
        [link("a/out", "../..")],
        [link("a/out", "b/../../..")],
        [link("hard", "../evil", tarfile.LNKTYPE)],
        [link("a", "."), member("a/x", b"x")],
        [link("a/b", "."), link("a/b/c", "..")],
        [link("l", "b"), link("hard", "l", tarfile.LNKTYPE)],
        [member("pipe", type=tarfile.FIFOTYPE)],
        [member("dev", type=tarfile.CHRTYPE)],
    ],
    ids=lambda members: "+".join(info.name for info, _ in members),
)
def test_members_that_lead_out_are_refused(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    with pytest.raises(ArchiveError):
        unpack(tar(tmp_path / "a.tar.gz", *members), out)
    assert not list(tmp_path.rglob("evil"))


def test_bombs_are_refused_by_size_and_by_number(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar.gz", *(member(f"{n}", bytes(1000)) for n in range(10)))
    with pytest.raises(ArchiveError, match="unpacks to more"):
        unpack(archive, tmp_path, max_bytes=9_999)
    with pytest.raises(ArchiveError, match="unpacks to more"):
        unpack(archive, tmp_path, max_members=9)
    unpack(archive, tmp_path, max_bytes=10_000, max_members=10)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_unpacks_to_a_gigabyte_is_not_read(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 1 << 30
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(64):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match="one of its headers"):
            unpack(path, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("keep", [0, 10, 200, -20])
def test_a_cut_archive_is_damaged(tmp_path: Path, keep: int) -> None:
    whole = tar(tmp_path / "a.tar.gz", member("x", bytes(range(256)) * 64)).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:keep])
    with pytest.raises(ArchiveError, match="damaged or cut short"):
        unpack(tmp_path / "cut.tar.gz", tmp_path)


def test_zip_keeps_programs_and_refuses_what_leads_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as packed:
        info = zipfile.ZipInfo("bin/llama-imatrix")
        info.external_attr = 0o100755 << 16
        packed.writestr(info, b"x")
        packed.writestr("bin/readme.txt", b"y")
    unpack(tmp_path / "good.zip", out)
    assert (out / "bin/llama-imatrix").stat().st_mode & 0o100
    assert not (out / "bin/readme.txt").stat().st_mode & 0o100
    for name, attributes in (("../evil", 0), ("/evil", 0), ("link", 0o120777 << 16)):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as packed:
            info = zipfile.ZipInfo(name)
            info.external_attr = attributes
            packed.writestr(info, b"/etc")
        with pytest.raises(ArchiveError):
            unpack(tmp_path / "bad.zip", out)
    with pytest.raises(ArchiveError, match="unpacks to more"):
        unpack(tmp_path / "good.zip", out, max_bytes=1)


# llama-cpp-python's source distribution

CHANGELOG = b"# Changelog\n\n- feat: update llama.cpp to ggml-org/llama.cpp@0c1e57098\n- to ggml-org/llama.cpp@4df29be4f\n"


def sdist(store: Store, version: str, *, changelog: bytes = CHANGELOG, tree: str = "vendor/llama.cpp") -> Path:
    store.downloads.mkdir(parents=True, exist_ok=True)
    top = f"llama_cpp_python-{version}"
    return tar(
        store.downloads / f"{top}.tar.gz",
        member(f"{top}/CHANGELOG.md", changelog),
        member(f"{top}/{tree}/CMakeLists.txt", b"project(x)"),
    )


def test_a_downloaded_sdist_is_reused_and_tells_its_commit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sdist(store, "1.2.3")
    found = fetch_sdist("1.2.3", store, Runner(), lambda event: pytest.fail("nothing needs fetching"))
    assert (found.kind, found.version, found.commit) == ("sdist", "1.2.3", "0c1e57098")
    assert len(found.sha256) == 64
    assert not found.tree.exists()
    unpack_source(found, store, Runner())
    assert (found.tree / "CMakeLists.txt").is_file()
    assert [path.name for path in store.sources.iterdir()] == [found.tree.parent.parent.name]


def test_an_sdist_without_a_commit_or_without_llama_cpp(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sdist(store, "1.2.3", changelog=b"nothing", tree="elsewhere")
    found = fetch_sdist("1.2.3", store, Runner(), lambda event: None)
    assert found.commit == ""
    with pytest.raises(ToolchainError, match="cannot be used"):
        unpack_source(found, store, Runner())
    assert list(store.sources.iterdir()) == []


def test_a_damaged_sdist_names_the_file_to_remove(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = sdist(store, "1.2.3")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ToolchainError) as caught:
        fetch_sdist("1.2.3", store, Runner(), lambda event: None)
    assert f"rm {path}" in caught.value.todo


def test_an_sdist_that_changed_since_it_was_first_used_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = sdist(store, "1.2.3")
    for _ in range(2):
        fetch_sdist("1.2.3", store, Runner(), lambda event: None)
    sdist(store, "1.2.3", changelog=b"changed")
    with pytest.raises(ToolchainError, match="is not the source of") as caught:
        fetch_sdist("1.2.3", store, Runner(), lambda event: None)
    assert caught.value.todo.endswith(f"rm {path} {path}.sha256")


def test_the_tested_sdist_is_known_from_the_first_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = sdist(store, TESTED_VERSION)
    with pytest.raises(ToolchainError, match="is not the source of") as caught:
        fetch_sdist(TESTED_VERSION, store, Runner(), lambda event: None)
    assert KNOWN_SHA256[TESTED_VERSION] in caught.value.why
    assert caught.value.todo.endswith(f"rm {path}")


def test_unpacking_stops_when_asked_and_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sdist(store, "1.2.3")
    found = fetch_sdist("1.2.3", store, Runner(), lambda event: None)
    stop = Stop()
    stop.request()
    with pytest.raises(InterruptedRunError):
        unpack_source(found, store, Runner(stop))
    assert list(store.sources.iterdir()) == []


def test_an_environment_without_pip_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolchainError) as caught:
        fetch_sdist("1.2.3", Store(tmp_path), Runner(), lambda event: None)
    assert "ensurepip" in caught.value.todo
    assert "uv pip install pip" in caught.value.todo
    assert "--source" in caught.value.todo


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("ERROR: No matching distribution found for llama-cpp-python==9", "no source of that version"),
        (
            "NewConnectionError: Failed to establish: [Errno -3] Temporary failure in name resolution",
            "could not reach its index",
        ),
        ("error: subprocess-exited-with-error", "exit code 1"),
    ],
)
def test_pip_failures_in_words(tmp_path: Path, line: str, why: str) -> None:
    error = sources._pip_error("9", Outcome(Command(("pip",)), 1, 1.0, (line,), None), tmp_path / "log")
    assert isinstance(error, DownloadError)
    assert why in error.why
    assert str(tmp_path / "log") in error.todo


def test_the_version_follows_the_installed_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.0+cu124")
    assert default_version() == "0.4.0"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert default_version() == TESTED_VERSION


# A checkout


def checkout(path: Path) -> Path:
    (path / "tools" / "imatrix").mkdir(parents=True)
    lines = ("MAJOR 0", "MINOR 5", "PATCH 2")
    (path / "CMakeLists.txt").write_text("\n".join(f"set(LLAMA_VERSION_{line})" for line in lines), encoding="utf-8")
    return path


def test_a_checkout_without_git_is_known_by_what_it_looks_like(tmp_path: Path) -> None:
    tree = checkout(tmp_path / "llama.cpp")
    first = directory_source(tree)
    assert (first.kind, first.version, first.tree) == ("directory", "0.5.2", tree)
    assert first.commit.startswith("tree-")
    assert directory_source(tree) == first
    (tree / "build").mkdir()
    (tree / "build" / "x.o").touch()
    assert directory_source(tree) == first  # what a build leaves there is no edit
    (tree / "tools" / "imatrix" / "imatrix.cpp").write_text("int main;", encoding="utf-8")
    assert directory_source(tree).commit != first.commit


def test_trees_without_a_version_and_directories_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text("project(llama.cpp)", encoding="utf-8")
    assert own_version(tmp_path) == "source"
    with pytest.raises(UsageError, match="not a llama"):
        directory_source(tmp_path)


@pytest.mark.parametrize("ref", ["b9976", "v0.5.0", "master", "gg/some-branch"])
def test_tags_that_may_be_given(ref: str) -> None:
    assert check_ref(ref) == ref


@pytest.mark.parametrize("ref", ["", "-b", "--upload-pack=x", "a b", "a..b", "x\n", "a;b", "ref/", "a.lock", "$(x)", "a" * 101])
def test_tags_that_could_be_something_else(ref: str) -> None:
    with pytest.raises(UsageError):
        check_ref(ref)
