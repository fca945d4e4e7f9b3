"""What counts as a toolchain, what its help tells, and the order in which places are tried.

The scripts here stand for what cannot exist on a test machine: a fork, a build for another processor, a hung program.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from imatrix_runner.errors import ToolchainError
from imatrix_runner.process import Captured
from imatrix_runner.toolchain import locate as locating
from imatrix_runner.toolchain.locate import ENV_VARIABLE, locate, require, usual_places
from imatrix_runner.toolchain.probe import (
    COUNTER,
    NEEDED,
    Rejected,
    find_backends,
    parse_devices,
    parse_options,
    parse_types,
    parse_version,
    probe,
    why_unfit,
)
from imatrix_runner.toolchain.store import RECORD, cache_dir

IMATRIX_HELP = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
--version                               show version and build info
-ub,   --ubatch-size N                  physical maximum batch size (default: 512)
                                        (env: LLAMA_ARG_UBATCH)
--list-devices                          print list of available devices and exit
-hf,   -hfr, --hf-repo <user>/<model>[:quant]
                                        mmproj is also downloaded automatically if available. to disable, add
                                        --no-mmproj
-ofreq, --output-frequency N            output the imatrix every N iterations (default: 10)
"""
QUANTIZE_HELP = """\
usage: llama-quantize [--help] [--allow-requantize] [--dry-run]
       model-f32.gguf [model-quant.gguf] type [nthreads]

  --tensor-type tensor_name=ggml_type
                                      example: --not-an-option attn_q=q8_0
  --imatrix file_name: use data in file_name as importance matrix for quant optimizations

 note : Q4_9   : not a type, it stands above the heading

 Allowed quantization types:
   2  or  Q4_0    :  4.34G, +0.4685 ppl @ Llama-3-8B
  12  or  Q3_K    : alias for Q3_K_M
  12  or  Q3_K_M  :  3.74G, +0.6569 ppl @ Llama-3-8B
  61  or  Q3_K_HIFI :  3.9 bpw, a fork's own
   0  or  F32     : 26.00G              @ 7B
          COPY    : only copy tensors, no quantizing
"""
VERSION = "version: 0.5.0-dev (build 9976, commit 0c1e57098)\nbuilt with GNU 12.2.0 for Linux x86_64"


def script(path: Path, body: str, *, mode: int = 0o755) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(mode)


def speaking(version: str = VERSION, help_text: str = IMATRIX_HELP, devices: str = "Available devices:\n  (none)") -> str:
    return f"""case "$1" in
--version) cat >&2 <<'EOF'
{version}
EOF
;;
--list-devices) cat <<'EOF'
{devices}
EOF
;;
--help) cat <<'EOF'
{help_text}
EOF
;;
*) exit 9 ;;
esac"""


def tools(directory: Path, **bodies: str) -> Path:
    """A directory of scripts that speak like llama.cpp; ``llama_quantize="exit 3"`` changes one of them."""
    directory.mkdir(parents=True, exist_ok=True)
    usual: Mapping[str, str] = {
        "llama-imatrix": speaking(),
        "llama-quantize": speaking(help_text=QUANTIZE_HELP) + "\nexit 1",
        "llama-tokenize": speaking(help_text="    --ids    only print the ids"),
    }
    for name, body in {**usual, **{key.replace("_", "-"): body for key, body in bodies.items()}}.items():
        script(directory / name, body)
    return directory


def why(directory: Path, seconds: float = 5.0) -> str:
    with pytest.raises(Rejected) as caught:
        probe(directory, "test", seconds=seconds)
    assert caught.value.rejection.directory == caught.value.directory == directory
    assert caught.value.origin == "test"
    return caught.value.why


# What the help texts tell


def test_options_are_the_spellings_at_the_left_not_the_words_of_descriptions() -> None:
    imatrix = parse_options(IMATRIX_HELP)
    assert imatrix == {
        *("-h", "--help", "--usage", "--version", "-ub", "--ubatch-size", "--list-devices", "-hf", "-hfr", "--hf-repo"),
        *("-ofreq", "--output-frequency"),
    }
    assert parse_options(QUANTIZE_HELP) == {"--help", "--allow-requantize", "--dry-run", "--tensor-type", "--imatrix"}


def test_types_are_open_and_keep_number_alias_and_order() -> None:
    types = parse_types(QUANTIZE_HELP)
    assert [entry.name for entry in types] == ["Q4_0", "Q3_K", "Q3_K_M", "Q3_K_HIFI", "F32", "COPY"]
    by_name = {entry.name: entry for entry in types}
    assert (by_name["Q3_K_HIFI"].number, by_name["Q3_K_HIFI"].help) == (61, "3.9 bpw, a fork's own")
    assert by_name["COPY"].number is None
    assert by_name["Q3_K"].alias_of == "Q3_K_M"
    assert by_name["Q3_K_M"].alias_of == ""
    assert by_name["F32"].number == 0


def test_a_flood_of_types_is_bounded() -> None:
    flood = "allowed quantization types\n" + "".join(f"  {n}  or  T{n} : x\n" for n in range(5000))
    assert len(parse_types(flood)) == 500


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 0.5.0-dev (build 1, commit 0c1e570)", ("0.5.0-dev", "1", "0c1e570")),
        ("version: 0.5.0-dev (build 0, commit 0c1e57098)", ("0.5.0-dev", "", "0c1e57098")),
        ("version: 4567 (a4f3b2c1)\nbuilt with cc", ("4567", "4567", "a4f3b2c1")),
        ("version: 4567 (unknown)", ("4567", "4567", "")),
        ("hello", ("unknown", "", "")),
    ],
)
def test_version_in_every_shape(text: str, expected: tuple[str, str, str]) -> None:
    assert parse_version(text) == expected


def test_devices_and_backends() -> None:
    text = "ggml_cuda_init: found 1 CUDA devices:\nAvailable devices:\n  CUDA0: NVIDIA H200 (143771 MiB, 143041 MiB free)\n"
    assert parse_devices(text) == ("CUDA0: NVIDIA H200 (143771 MiB, 143041 MiB free)",)
    assert parse_devices("Available devices:\n  (none)\n") == ()
    assert find_backends(text, ()) == ("cpu", "cuda")
    # HIP builds reuse CUDA's sources and some of their messages.
    assert find_backends("ggml_cuda_init: found 1 ROCm devices:\nAvailable devices:\n  ROCm0: AMD", ()) == ("cpu", "hip")
    assert find_backends("", ("libggml-vulkan.so", "libggml-cpu.so", "libggml-base.so.0")) == ("cpu", "vulkan")
    assert find_backends("", ("ggml-cuda.dll", "libggml-metal.dylib")) == ("cpu", "cuda", "metal")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Captured(1, "usage", ""), ""),
        (Captured(-4, "", ""), "SIGILL"),
        (Captured(-11, "", ""), "SIGSEGV"),
        (Captured(3221225781, "", ""), "DLL"),
        (Captured(-1073741795, "", ""), "processor"),
        (
            Captured(127, "", "x: error while loading shared libraries: libcudart.so.12: cannot open"),
            "libcudart.so.12 is missing",
        ),
        (Captured(-6, "", "dyld[1]: Library not loaded: @rpath/libllama.dylib"), "@rpath/libllama.dylib is missing"),
        (Captured(1, "", "/lib/libc.so.6: version `GLIBC_2.38' not found"), "newer system"),
        (Captured(42, "", "boom"), "exit code 42, boom"),
    ],
)
def test_why_a_run_does_not_count(answer: Captured, expected: str) -> None:
    got = why_unfit(answer)
    assert expected in got if expected else got == ""


# What counts


def test_a_fork_with_its_own_type_counts(tmp_path: Path) -> None:
    found = probe(tools(tmp_path / "fork"), "test")
    hifi = found.type("q3_k_hifi")
    assert hifi is not None
    assert hifi.number == 61
    assert found.identity() == "llama.cpp 0.5.0-dev build 9976 commit 0c1e57098"
    assert found.knows("llama-imatrix", "--output-frequency")
    assert not found.knows("llama-imatrix", "--no-mmproj")
    assert set(found.tools) == {*NEEDED, COUNTER}
    assert found.backends == ("cpu",)
    assert found.devices == ()
    assert found.converter is None
    with pytest.raises(ToolchainError) as caught:
        found.tool("llama-perplexity")
    assert "imatrix-runner tools build" in caught.value.todo
    assert caught.value.exit_code == 3


def test_an_old_build_without_list_devices_is_not_asked_for_it(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    body = f'[ "$1" = --list-devices ] && touch {asked}\n' + speaking("version: 4567 (a4f3b2c1)", "-m, --model FNAME  model")
    found = probe(tools(tmp_path / "old", llama_imatrix=body), "test")
    assert found.identity() == "llama.cpp 4567 build 4567 commit a4f3b2c1"
    assert not asked.exists()


def test_a_gpu_build_is_known_by_its_library_and_the_converter_by_its_place(tmp_path: Path) -> None:
    tools(tmp_path / "prefix" / "bin")
    (tmp_path / "prefix" / "lib").mkdir()
    (tmp_path / "prefix" / "lib" / "libggml-cuda.so").touch()
    (tmp_path / "prefix" / "converter").mkdir()
    (tmp_path / "prefix" / "converter" / "convert_hf_to_gguf.py").touch()
    found = probe(tmp_path / "prefix" / "bin", "test")
    assert found.backends == ("cpu", "cuda")
    assert found.converter == tmp_path / "prefix" / "converter" / "convert_hf_to_gguf.py"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("kill -ILL $$", "llama-tokenize does not run: killed by SIGILL (illegal instruction: this processor does not have it"),
        ("echo 'error while loading shared libraries: libllama.so: gone' >&2; exit 127", "libllama.so is missing"),
        ("exit 0", "lists no options"),
        ("exit 77", "exit code 77"),
    ],
)
def test_a_broken_needed_tool_refuses_the_directory(tmp_path: Path, body: str, expected: str) -> None:
    assert expected in why(tools(tmp_path / "bin", llama_tokenize=body))


def test_a_hanging_tool_is_refused_within_the_limit(tmp_path: Path) -> None:
    directory = tools(tmp_path / "bin", llama_quantize="exec sleep 60")
    began = time.monotonic()
    assert why(directory, seconds=0.4) == "llama-quantize gave no answer within 0.4 s"
    assert time.monotonic() - began < 5


def test_files_that_are_not_programs_are_refused(tmp_path: Path) -> None:
    directory = tools(tmp_path / "bin")
    (directory / "llama-imatrix").write_text("a note", encoding="utf-8")
    assert "not a program for this machine" in why(directory)
    (directory / "llama-imatrix").chmod(0o644)
    assert "may not be executed" in why(directory)
    (directory / "llama-imatrix").write_text("#!/no/such/interpreter\n", encoding="utf-8")
    (directory / "llama-imatrix").chmod(0o755)
    assert "loader or interpreter" in why(directory)
    (directory / "llama-imatrix").unlink()
    (directory / "llama-quantize").unlink()
    assert why(directory) == "llama-imatrix and llama-quantize are not there"


def test_a_toolchain_need_not_count_tokens(tmp_path: Path) -> None:
    directory = tools(tmp_path / "bin")
    (directory / "llama-tokenize").unlink()
    found = probe(directory, "test")
    assert set(found.tools) == set(NEEDED)
    with pytest.raises(ToolchainError, match="llama-tokenize is not part of this toolchain"):
        found.tool("llama-tokenize")


def test_programs_under_the_names_they_had_until_june_2024(tmp_path: Path) -> None:
    """Only where the user says that they are llama.cpp's: other projects have a ``quantize``, too."""
    directory = tools(tmp_path / "llama.cpp")
    for path in list(directory.iterdir()):
        path.rename(path.with_name(path.name.removeprefix("llama-")))
    named = locate(tmp_path / "llama.cpp", env={}, cache=tmp_path / "cache").toolchain
    assert named is not None
    assert named.tool("llama-quantize") == directory / "quantize"
    assert locate(None, env={"PATH": str(directory)}, cache=tmp_path / "cache", system="test").toolchain is None


def test_a_quantizer_without_types_is_refused(tmp_path: Path) -> None:
    assert "no quantisation types" in why(tools(tmp_path / "bin", llama_quantize=speaking()))


def test_a_broken_optional_tool_is_left_out(tmp_path: Path) -> None:
    gguf_split = speaking(help_text="  --merge   merge")
    found = probe(tools(tmp_path / "bin", llama_perplexity="kill -SEGV $$", llama_gguf_split=gguf_split), "test")
    assert "llama-perplexity" not in found.tools
    assert found.knows("llama-gguf-split", "--merge")


# Where it is looked for


@pytest.fixture(autouse=True)
def _no_usual_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locating, "usual_places", lambda env, system: ())


def managed(cache: Path, key: str, date: str, **bodies: str) -> Path:
    directory = tools(cache / "toolchains" / key / "bin", **bodies)
    record = {"key": key, "kind": "sdist", "source": "s", "version": "1", "commit": "c", "backend": "cpu", "date": date}
    (directory.parent / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return directory


def test_explicit_wins_over_the_environment_and_both_over_all_else(tmp_path: Path) -> None:
    named, by_env, on_path = (tools(tmp_path / name) for name in ("named", "env", "path"))
    managed(tmp_path / "cache", "a", "2026-01-01")
    env = {ENV_VARIABLE: str(by_env), "PATH": str(on_path)}
    assert require(locate(named, env=env, cache=tmp_path / "cache")).directory == named
    found = require(locate(None, env=env, cache=tmp_path / "cache"))
    assert (found.directory, found.origin) == (by_env, ENV_VARIABLE)


@pytest.mark.parametrize("by_option", [True, False])
def test_a_named_directory_that_fails_is_an_error_never_a_fallback(tmp_path: Path, by_option: bool) -> None:
    bad, good = tmp_path / "bad", tools(tmp_path / "good")
    bad.mkdir()
    env = {"PATH": str(good)} | ({} if by_option else {ENV_VARIABLE: str(bad)})
    found = locate(bad if by_option else None, env=env, cache=tmp_path / "cache")
    assert found.toolchain is None
    assert len(found.rejected) == 1
    with pytest.raises(ToolchainError) as caught:
        require(found)
    assert ("--llama-cpp" if by_option else ENV_VARIABLE) in caught.value.what
    assert str(bad) in caught.value.why
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("inside", ["", "bin", "build/bin", "build/bin/Release"])
def test_a_directory_may_be_a_bin_folder_a_prefix_or_a_checkout(tmp_path: Path, inside: str) -> None:
    tools(tmp_path / "llama.cpp" / inside)
    assert require(locate(tmp_path / "llama.cpp", env={}, cache=tmp_path)).directory == tmp_path / "llama.cpp" / inside


def test_the_newest_managed_toolchain_that_runs_is_taken(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    older = managed(cache, "older", "2026-01-01T00:00:00Z")
    managed(cache, "newer", "2026-02-01T00:00:00Z", llama_imatrix="kill -ILL $$")
    managed(cache, ".half.part", "2026-03-01T00:00:00Z")
    tools(cache / "toolchains" / "unrecorded" / "bin")
    found = locate(None, env={"PATH": str(tools(tmp_path / "path"))}, cache=cache)
    assert require(found).directory == older
    assert [entry.directory.parent.name for entry in found.rejected] == ["newer"]


def test_path_counts_but_never_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tools(tmp_path / "here")
    monkeypatch.chdir(here)
    assert locate(None, env={"PATH": ".::bin:./"}, cache=tmp_path / "cache") == locating.Found(None, ())
    there = tools(tmp_path / "there")
    found = require(locate(None, env={"PATH": f".:{tmp_path / 'empty'}:{there}"}, cache=tmp_path / "cache"))
    assert (found.directory, found.origin) == (there, "PATH")


def test_usual_places_come_last_and_each_directory_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, usual = tools(tmp_path / "broken", llama_imatrix="exit 5"), tools(tmp_path / "usual" / "build" / "bin")
    monkeypatch.setattr(locating, "usual_places", lambda env, system: (broken, tmp_path / "usual"))
    found = locate(None, env={"PATH": f"{broken}:{broken}/"}, cache=tmp_path / "cache")
    assert require(found).directory == usual
    assert [entry.origin for entry in found.rejected] == ["PATH"]


def test_nothing_found_names_the_refused_and_the_remedy(tmp_path: Path) -> None:
    broken = tools(tmp_path / "broken", llama_imatrix="exit 5")
    with pytest.raises(ToolchainError) as caught:
        require(locate(None, env={"PATH": str(broken)}, cache=tmp_path / "cache"))
    assert f"{broken} (PATH): llama-imatrix does not run: exit code 5" in caught.value.why
    assert "imatrix-runner tools build" in caught.value.todo
    with pytest.raises(ToolchainError, match="llama-quantize"):
        require(locate(None, env={}, cache=tmp_path / "cache"))


def test_usual_places_of_each_system() -> None:
    assert Path("/home/u/llama.cpp") in usual_places({"HOME": "/home/u"}, "linux")
    assert Path("/opt/homebrew/bin") in usual_places({}, "darwin")
    assert Path("C:/Program Files/llama.cpp") in usual_places({"ProgramFiles": "C:/Program Files"}, "win32")


def test_the_cache_can_be_moved_by_the_environment(tmp_path: Path) -> None:
    assert cache_dir({"IMATRIX_RUNNER_CACHE": str(tmp_path)}) == tmp_path
    assert cache_dir({}).name == "imatrix-runner"
