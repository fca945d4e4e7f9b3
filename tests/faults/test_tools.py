"""Programs that misbehave: nothing of theirs gets a final name, and the other levels are unharmed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import RunCommand
from support.llama_tools import WORK_ONLY, BareTools, digest, fake_tools, leftovers, levels_in
from support.oracles import quantized

IOSTREAM = "llama_model_quantize: failed to quantize: basic_ios::clear: iostream error"


@pytest.mark.parametrize(
    ("fault", "kind", "why"),
    [
        pytest.param("sleep 1000", "engine", "it wrote no output and used no CPU time, and was ended", id="hangs"),
        pytest.param(
            "kill -KILL $$",
            "engine",
            "killed by SIGKILL (by the kernel when memory ran out, or by another program)",
            id="killed",
        ),
        pytest.param("kill -ABRT $$", "engine", "killed by SIGABRT", id="aborts"),
        pytest.param(f"echo '{IOSTREAM}' >&2; exit 1", "engine", IOSTREAM.rpartition("quantize: ")[2], id="iostream error"),
        pytest.param('head -c 300000 /dev/zero > "$out"; exit 0', "invalid-data", "zero", id="NUL-filled"),
        pytest.param('"$real" "$@"; truncate -s -4096 "$out"; exit 0', "invalid-data", "a complete one has", id="truncated"),
        pytest.param("exit 0", "invalid-data", "the engine left nothing", id="writes nothing"),
        pytest.param(
            'shift 2; exec "$real" "$@"', "invalid-data", "it was made with no imatrix entries instead of 14", id="blind"
        ),
        pytest.param('exec "$real" --pure "$@"', "invalid-data", "planned:", id="another mixture"),
    ],
)
def test_a_faulty_level_fails_alone(
    fault: str,
    kind: str,
    why: str,
    tiny_model: Path,
    tiny_imatrix: Path,
    runner: RunCommand,
    tools: BareTools,
    tmp_path: Path,
) -> None:
    script = f'{WORK_ONLY}\nif [ "$type" = Q4_0 ]; then {fault}; fi'
    fake = fake_tools(tools.toolchain, tmp_path / "fake", llama_quantize=script)
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q4_0,Q5_K_M", "--timeout", "2")
    done = runner(*arguments, "--llama-cpp", fake, "--json")
    assert done.code == 100, done.err
    bad, good = done.document["levels"]
    assert (bad["level"], bad["status"], bad["error"]["kind"]) == ("Q4_0", "failed", kind)
    assert why in bad["error"]["why"]
    assert (good["level"], good["status"]) == ("Q5_K_M", "done")
    workspace = tmp_path / "work" / "tiny"
    (bare,) = quantized(tools, tiny_model, "Q5_K_M", imatrix=tiny_imatrix).digests
    assert levels_in(workspace) == {"Q5_K_M": bare}
    assert leftovers(workspace) == []


def test_the_same_command_heals_once_the_tools_work(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    script = f'{WORK_ONLY}\nif [ "$type" = Q4_0 ]; then echo "GGML_ASSERT(x) failed" >&2; kill -ABRT $$; fi'
    fake = fake_tools(tools.toolchain, tmp_path / "fake", llama_quantize=script)
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q4_0,Q5_K_M", "--engine", "binaries")
    failed = runner(*arguments, "--llama-cpp", fake)
    assert failed.code == 100
    assert "Q4_0: llama-quantize failed on Q4_0; killed by SIGABRT (the program aborted); GGML_ASSERT(x) failed" in failed.out
    assert f"Full log: {tmp_path / 'work' / 'tiny' / 'logs' / 'level-Q4_0.log'}" in failed.out
    status = runner("status", "--json").document["workspaces"][0]
    assert (status["state"], status["detail"]) == ("resumable", "missing: Q4_0")
    healed = runner(*arguments)
    assert healed.code == 0
    assert "1 made, 1 was up to date" in healed.out


def test_a_hung_child_is_really_gone(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    """One that ignores SIGTERM and has children of its own."""
    mark = tmp_path / "alive"
    script = f'{WORK_ONLY}\ntrap "" TERM; (while :; do sleep 0.2; touch {mark}; done) & while :; do sleep 1; done'
    fake = fake_tools(tools.toolchain, tmp_path / "fake", llama_quantize=script)
    done = runner("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q4_0", "--timeout", "1", "--llama-cpp", fake)
    assert done.code == 100
    mark.unlink()
    assert runner("status").code == 0  # takes its time
    assert not mark.exists()


def test_a_torn_range_of_the_imatrix_is_computed_again(
    tiny_model: Path, tiny_text: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    script = f'{WORK_ONLY}\ncase "$out" in *-000008.gguf) "$real" "$@"; truncate -s 9000 "$out"; exit 0;; esac'
    fake = fake_tools(tools.toolchain, tmp_path / "fake", llama_imatrix=script)
    arguments = ("imatrix", "generate", tiny_model, "-f", tiny_text, "-c", "128", "-b", "512", "--chunks", "12")
    arguments += ("--output-frequency", "4", "--engine", "binaries")
    torn = runner(*arguments, "--llama-cpp", fake)
    assert torn.code == 6
    assert "The imatrix of chunks 4 to 7 is not usable" in torn.err
    assert not (tmp_path / "work" / "tiny" / "imatrix.gguf").exists()
    again = runner(*arguments)
    assert again.code == 0, again.err
    assert "4 chunks kept" in again.err
    assert runner(*arguments, "--work-dir", "other").code == 0
    assert digest(tmp_path / "work" / "tiny" / "imatrix.gguf") == digest(tmp_path / "other" / "tiny" / "imatrix.gguf")


def test_an_imatrix_run_that_dies(
    tiny_model: Path, tiny_text: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    script = f"{WORK_ONLY}\nkill -KILL $$"
    fake = fake_tools(tools.toolchain, tmp_path / "fake", llama_imatrix=script)
    done = runner("run", tiny_model, "-f", tiny_text, "-c", "128", "--levels", "Q4_0", "--llama-cpp", fake)
    assert done.code == 5
    assert "Error: llama-imatrix failed." in done.err
    assert "killed by SIGKILL" in done.err
    assert "then run the same command again: it continues" in done.err


def test_a_forks_own_type_is_a_level(
    tiny_model: Path, tiny_imatrix: Path, runner: RunCommand, tools: BareTools, tmp_path: Path
) -> None:
    """A llama-quantize that offers Q3_K_HIFI: nothing here knows that name."""
    script = """
case " $* " in *" --help "*) "$real" --help; echo "  77  or  Q3_K_HIFI :  3.90G, +0.5000 ppl @ Llama-3-8B"; exit 1;; esac
for word in "$@"; do
    shift
    if [ "$word" = Q3_K_HIFI ]; then word=Q3_K_M; fi
    set -- "$@" "$word"
done
"""
    fork = fake_tools(tools.toolchain, tmp_path / "fork", llama_quantize=script)
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q3_K_HIFI,Q4_0")
    assert runner(*arguments).code == 2
    done = runner(*arguments, "--llama-cpp", fork)
    assert done.code == 0, done.err
    written = levels_in(tmp_path / "work" / "tiny")
    bare = tools.quantize(tiny_model, tmp_path / "bare.gguf", "Q3_K_M", imatrix=tiny_imatrix)
    assert written["Q3_K_HIFI"] == digest(bare)
    assert "2 were up to date" in runner(*arguments, "--llama-cpp", fork).out
