"""Commands in a report: they can be typed again, and tell nothing of somebody's folders."""

from __future__ import annotations

import pytest

from imatrix_runner.workflow.report_steps import bare_command


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (
            "cd /home/ada/m && llama-quantize --imatrix imatrix.gguf /data/m-BF16.gguf /home/ada/m/m-Q4_K_M.gguf Q4_K_M",
            "llama-quantize --imatrix imatrix.gguf m-BF16.gguf m-Q4_K_M.gguf Q4_K_M",
        ),
        ("imatrix-runner run ../secret/m-BF16.gguf --work-dir=/mnt/ada", "imatrix-runner run m-BF16.gguf --work-dir=ada"),
        ("imatrix-runner run secret/project/m-BF16.gguf -f texts/medical.txt", "imatrix-runner run m-BF16.gguf -f medical.txt"),
        ("imatrix-runner run ~/models/llama -ngl 99", "imatrix-runner run llama -ngl 99"),
        (r"imatrix-runner run 'C:\Users\ada\m.gguf'", "imatrix-runner run m.gguf"),
        ("imatrix-runner run org/name --preset bartowski", "imatrix-runner run org/name --preset bartowski"),
        ("imatrix-runner run org/name@refs/pr/1:sub/m.gguf", "imatrix-runner run org/name@refs/pr/1:sub/m.gguf"),
        (
            r"imatrix-runner quantize m.gguf --tensor-type 'blk\.(0|1)\..*=q6_k'",
            r"imatrix-runner quantize m.gguf --tensor-type 'blk\.(0|1)\..*=q6_k'",
        ),
        ("imatrix-runner run m.gguf -- --foo", "imatrix-runner run m.gguf -- --foo"),
        ("imatrix-runner run '/home/ada/my model.gguf'", "imatrix-runner run 'my model.gguf'"),
        ("", ""),
        ("imatrix-runner run 'unclosed", ""),
        ("imatrix-runner run m\x1b[2J.gguf", "imatrix-runner run 'm\ufffd[2J.gguf'"),
    ],
)
def test_a_command_keeps_names_and_loses_folders(typed: str, shown: str) -> None:
    assert bare_command(typed) == shown


def test_a_directory_that_looks_like_a_hub_id_is_known_by_having_been_the_source() -> None:
    assert bare_command("imatrix-runner run models/llama", "models/llama") == "imatrix-runner run llama"
    assert bare_command("imatrix-runner run models/llama") == "imatrix-runner run models/llama"
