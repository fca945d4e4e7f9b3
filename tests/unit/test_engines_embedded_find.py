"""Finding llama-cpp-python's libraries: the order of places, the proof, what breaks it, and what is remembered of it."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from imatrix_runner.engines.embedded import bindings as find_module
from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE, UnusableBindings, find, worker_command
from imatrix_runner.engines.protocol import ProbeJob
from imatrix_runner.files import read_json, write_json
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import RECORD, BuildRecord, Store
from support.libraries import FAKE_PROOF, copy_libraries, fake_python, link_libraries


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory that looks as if it held llama.cpp's libraries."""
    path = tmp_path / "lib"
    path.mkdir()
    (path / "libllama.so").write_bytes(b"not a library")
    return path


def named(folder: Path) -> dict[str, str]:
    return {LIBRARY_VARIABLE: str(folder)}


def managed(
    cache: Path, key: str, toolchain: Toolchain, *, version: str, kind: str = "sdist", date: str = "2026-01-01"
) -> Path:
    """A toolchain in the managed cache that holds libraries only."""
    root = Store(cache).toolchains / key
    copy_libraries(toolchain, root / "bin")
    write_json(root / RECORD, BuildRecord(key, kind, "", version, "abc", "cpu", date))
    return root / "bin"


class TestPlaces:
    def test_the_variable_of_the_bindings_comes_first(self, toolchain: Toolchain, tmp_path: Path, cache: Path) -> None:
        managed(cache, "a", toolchain, version=importlib.metadata.version("llama-cpp-python"))
        mine = copy_libraries(toolchain, tmp_path / "mine")
        found = find(named(mine), cache)
        assert (found.directory, found.library, found.origin) == (mine, mine, LIBRARY_VARIABLE)
        assert found.backends == ("cpu",)
        assert "CPU" in found.features
        assert found.ftypes["MOSTLY_Q4_K_M"] == 15

    def test_a_relative_directory_is_made_absolute_for_the_worker(
        self, toolchain: Toolchain, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy_libraries(toolchain, tmp_path / "mine")
        monkeypatch.chdir(tmp_path)
        assert find({LIBRARY_VARIABLE: "mine"}, cache).library == tmp_path / "mine"

    def test_a_named_directory_without_libraries_is_refused(self, tmp_path: Path, cache: Path) -> None:
        with pytest.raises(UnusableBindings, match="holds no llama library") as caught:
            find(named(tmp_path), cache)
        assert f"Unset {LIBRARY_VARIABLE}" in caught.value.todo
        assert caught.value.exit_code == 3

    def test_the_package_s_own_libraries_come_next(
        self, toolchain: Toolchain, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "package").mkdir()
        own = copy_libraries(toolchain, tmp_path / "package" / "lib")
        monkeypatch.setattr(find_module, "_package", lambda: ("0.3.36", tmp_path / "package"))
        monkeypatch.setattr(sys, "executable", str(fake_python(tmp_path, f"echo '{FAKE_PROOF}'")))
        found = find({}, cache)
        assert (found.directory, found.library, found.origin) == (own, None, "its own libraries")
        assert find({LIBRARY_VARIABLE: ""}, cache).library == own  # an empty one would mean the working directory

    def test_without_any_the_toolchain_of_the_same_version_serves(self, toolchain: Toolchain, cache: Path) -> None:
        version = importlib.metadata.version("llama-cpp-python")
        managed(cache, "other", toolchain, version="0.3.1", date="2026-03-01")
        managed(cache, "tag", toolchain, version=version, kind="git", date="2026-02-01")
        same = managed(cache, "same", toolchain, version=version)
        assert find({}, cache).directory == same

    def test_a_toolchain_that_does_not_load_leaves_the_next_its_turn(self, toolchain: Toolchain, cache: Path) -> None:
        version = importlib.metadata.version("llama-cpp-python")
        broken = managed(cache, "newer", toolchain, version=version, date="2026-03-01")
        for library in broken.glob("libggml-base*"):
            library.unlink()
        good = managed(cache, "older", toolchain, version=version)
        assert find({}, cache).directory == good

    def test_no_libraries_anywhere_names_both_remedies(self, cache: Path) -> None:
        with pytest.raises(UnusableBindings, match="installed without its libraries") as caught:
            find({}, cache)
        assert caught.value.installed
        assert "tools build" in caught.value.todo
        assert "pip install" in caught.value.todo

    def test_no_package_is_told_with_the_interpreter(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(find_module, "DISTRIBUTION", "no-such-distribution")
        with pytest.raises(UnusableBindings, match="is not installed for") as caught:
            find({}, cache)
        assert not caught.value.installed


class TestIdentity:
    def test_it_does_not_depend_on_the_place(self, toolchain: Toolchain, tmp_path: Path, cache: Path) -> None:
        copied = find(named(copy_libraries(toolchain, tmp_path / "copied")), cache)
        linked = find(named(link_libraries(toolchain, tmp_path / "linked")), cache)
        assert copied.identity() == linked.identity()
        assert copied.identity().startswith("llama-cpp-python ")
        assert str(tmp_path) not in copied.identity()

    def test_it_tells_libraries_apart(self, toolchain: Toolchain, tmp_path: Path, cache: Path) -> None:
        one = find(named(copy_libraries(toolchain, tmp_path / "one")), cache)
        other = copy_libraries(toolchain, tmp_path / "other")
        with next(path for path in other.glob("libggml-cpu.so*") if not path.is_symlink()).open("ab") as library:
            library.write(b"\0")  # loads as before, and is another build
        assert find(named(other), cache).identity() != one.identity()

    def test_programs_and_other_libraries_do_not_count(self, toolchain: Toolchain, tmp_path: Path, cache: Path) -> None:
        bare = copy_libraries(toolchain, tmp_path / "bare")
        assert find(named(bare), cache).digest == find(named(toolchain.directory), cache).digest

    def test_devices_and_features_are_not_part_of_it(self, toolchain: Toolchain, tmp_path: Path, cache: Path) -> None:
        found = find(named(copy_libraries(toolchain, tmp_path / "lib")), cache)
        assert replace(found, devices=("CUDA0: a GPU",), features="", origin="").identity() == found.identity()


SHELL = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")


@SHELL
class TestBrokenLibraries:
    """A worker that ends as workers do whose library is broken."""

    @pytest.mark.parametrize(
        ("script", "why"),
        [
            ("kill -ILL $$", "illegal instruction: this processor does not have it, or it was built wrongly"),
            ("kill -SEGV $$", "killed by SIGSEGV"),
            ("kill -ABRT $$", "killed by SIGABRT"),
            ("exit 139", "exit code 139"),
            ("echo 'GGML_ASSERT(false) failed' >&2; exit 134", "GGML_ASSERT"),
            ('echo \'{"type":"progress","step":"x","done":1}\'; head -c 100000 /dev/urandom', "exit code 0"),
            ("echo 'garbage'; echo 'ImportError: cannot import name x' >&2; exit 1", "ImportError: cannot import name x"),
            ('echo "libm.so: version \\`GLIBC_2.99\' not found" >&2; exit 1', "built for a newer system"),
            (f"echo '{FAKE_PROOF}'; kill -SEGV $$", "killed by SIGSEGV"),
            ("exit 0", "no output"),
            ("sleep 60", "do not answer"),
        ],
        ids=[
            "sigill",
            "sigsegv",
            "sigabrt",
            "139",
            "assert",
            "garbage",
            "import",
            "glibc",
            "proof-then-crash",
            "silent",
            "hang",
        ],
    )
    def test_each_becomes_a_plain_reason(
        self, tmp_path: Path, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
    ) -> None:
        monkeypatch.setattr(sys, "executable", str(fake_python(tmp_path, script)))
        began = time.monotonic()
        with pytest.raises(UnusableBindings, match=why) as caught:
            find(named(folder), cache, seconds=2)
        assert str(folder) in caught.value.why
        assert LIBRARY_VARIABLE in caught.value.todo
        assert time.monotonic() - began < 20
        assert not (cache / "bindings").exists()  # a failure is not remembered: it may be repaired at any moment

    def test_the_worker_s_own_reason_is_passed_on(
        self, tmp_path: Path, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failed = '{"type":"failed","what":"w","why":"it lays tensors out in another way","todo":"t","exit_code":3}'
        monkeypatch.setattr(sys, "executable", str(fake_python(tmp_path, f"echo '{failed}'; exit 3")))
        with pytest.raises(UnusableBindings, match="it lays tensors out in another way"):
            find(named(folder), cache)

    def test_backends_that_are_plug_ins_are_refused(
        self, tmp_path: Path, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proof = FAKE_PROOF.replace('["cpu"]', "[]")
        monkeypatch.setattr(sys, "executable", str(fake_python(tmp_path, f"echo '{proof}'")))
        with pytest.raises(UnusableBindings, match="no CPU backend"):
            find(named(folder), cache)


def test_garbage_named_as_a_library_is_told_by_the_real_worker(folder: Path, cache: Path) -> None:
    with pytest.raises(UnusableBindings, match="libraries do not load"):
        find(named(folder), cache)


def test_a_folder_in_the_working_directory_is_not_taken_for_the_bindings(
    toolchain: Toolchain, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    for package in ("llama_cpp", "imatrix_runner"):
        (here / package).mkdir(parents=True)
        (here / package / "__init__.py").write_text("raise SystemExit('this must not run')\n")
    monkeypatch.chdir(here)
    libraries = copy_libraries(toolchain, tmp_path / "lib")
    assert find(named(libraries), cache).version == importlib.metadata.version("llama-cpp-python")
    assert worker_command(ProbeJob(tmp_path), None).cwd == Path(find_module.__file__).parents[3]


@SHELL
class TestMemory:
    """The second command does not pay for the proof."""

    @pytest.fixture
    def asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A worker that proves itself and leaves a line here each time."""
        count = tmp_path / "asked"
        monkeypatch.setattr(sys, "executable", str(fake_python(tmp_path, f"echo x >>'{count}'; echo '{FAKE_PROOF}'")))
        return count

    def test_the_proof_is_remembered(self, folder: Path, cache: Path, asked: Path) -> None:
        assert find(named(folder), cache) == find(named(folder), cache)
        assert asked.read_text() == "x\n"

    def test_changed_libraries_are_asked_again(self, folder: Path, cache: Path, asked: Path) -> None:
        before = find(named(folder), cache)
        (folder / "libllama.so").write_bytes(b"another library")
        assert find(named(folder), cache).digest != before.digest
        assert asked.read_text() == "x\nx\n"

    def test_two_environments_in_turn_are_both_remembered(self, folder: Path, cache: Path, asked: Path) -> None:
        for devices in ("0", "1", "0", "1"):
            find({**named(folder), "CUDA_VISIBLE_DEVICES": devices}, cache)
        assert asked.read_text() == "x\nx\n"

    def test_variables_that_decide_about_devices_count(self, folder: Path, cache: Path, asked: Path) -> None:
        for devices in ("0", "0", "1"):
            find({**named(folder), "CUDA_VISIBLE_DEVICES": devices, "HOME": devices}, cache)
        assert asked.read_text() == "x\nx\n"

    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"key":"k","at":1,"digest":"d","answer":"{}"}', b"\xff" * 100])
    def test_a_broken_memory_is_replaced(self, folder: Path, cache: Path, asked: Path, content: bytes) -> None:
        find(named(folder), cache)
        (memory,) = (cache / "bindings").iterdir()
        memory.write_bytes(content)
        find(named(folder), cache)
        find(named(folder), cache)
        assert asked.read_text() == "x\nx\n"

    def test_what_it_says_is_checked_and_not_believed(self, folder: Path, cache: Path, asked: Path) -> None:
        find(named(folder), cache)
        (path,) = (cache / "bindings").iterdir()
        memory = read_json(path, find_module._Remembered)
        write_json(path, msgspec.structs.replace(memory, reply='{"type":"counted","n_tokens":1}'))
        assert find(named(folder), cache).version == "0.3.36"
        assert asked.read_text() == "x\nx\n"

    def test_a_build_for_a_gpu_is_asked_again_after_ten_minutes(
        self, folder: Path, cache: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "libggml-cuda.so").write_bytes(b"kernels")
        assert find(named(folder), cache).backends == ("cpu", "cuda")  # though no device is there at the moment
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 500)
        find(named(folder), cache)
        assert asked.read_text() == "x\n"
        monkeypatch.setattr(time, "time", lambda: now + 700)
        find(named(folder), cache)
        assert asked.read_text() == "x\nx\n"

    def test_a_build_for_the_cpu_is_remembered_for_good(
        self, folder: Path, cache: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find(named(folder), cache)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 1e8)
        find(named(folder), cache)
        assert asked.read_text() == "x\n"

    def test_a_cache_that_cannot_be_written_to_is_done_without(self, folder: Path, tmp_path: Path, asked: Path) -> None:
        (tmp_path / "file").touch()
        assert find(named(folder), tmp_path / "file").version == "0.3.36"


def test_a_lost_library_is_noticed(toolchain: Toolchain, tmp_path: Path, cache: Path) -> None:
    folder = copy_libraries(toolchain, tmp_path / "lib")
    find(named(folder), cache)
    shutil.rmtree(folder)
    with pytest.raises(UnusableBindings, match="holds no llama library"):
        find(named(folder), cache)
