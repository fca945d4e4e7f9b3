"""Commands in a report: they can be typed again, and tell nothing of somebody's folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from reports import sample_report

from imatrix_runner.files import Stamp
from imatrix_runner.journal import Journal, Output, Record
from imatrix_runner.report.document import ReportFile
from imatrix_runner.workflow.report_steps import bare_command, describe_steps


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


@pytest.mark.parametrize(
    ("chunks", "options", "command"),
    [
        (
            "140 from 10 --output-frequency 8",
            "-b 2048 -ub 512 -ngl 99 --parse-special name my text.txt",
            (
                "llama-imatrix -m m-BF16.gguf -f 'my text.txt' -o imatrix.gguf -c 512 --chunks 140 --chunk 10 "
                "-b 2048 -ub 512 -ngl 99 --parse-special"
            ),
        ),
        (
            "all from 0 --until-converged 0.05 --min-expert-tokens 64",
            "-b 512 -ub 512 name my text.txt",
            (
                "imatrix-runner imatrix generate m-BF16.gguf -f 'my text.txt' -o imatrix.gguf -c 512 "
                "--until-converged 0.05 --min-expert-tokens 64 -b 512 -ub 512"
            ),
        ),
    ],
)
def test_the_imatrix_is_llama_imatrix_where_that_can_do_it(chunks: str, options: str, command: str, tmp_path: Path) -> None:
    model = replace(sample_report().model, files=(ReportFile("mmproj-m-F16.gguf", 9), ReportFile("m-BF16.gguf", 10)))
    inputs = {"context": "512", "chunks": chunks, "options": options}
    record = Record.now(inputs, [Output("imatrix.gguf", Stamp(1, 2, 3))], "", 4.0, facts={"dataset": "my text.txt"})
    (step,) = describe_steps(Journal(tmp_path / "journal.json"), {}, record, model, "")
    assert (step.what, step.seconds, step.command) == ("imatrix", 4.0, command)


def test_a_conversion_is_told_if_the_levels_were_made_from_it(tmp_path: Path) -> None:
    journal, model = Journal(tmp_path / "journal.json"), replace(sample_report().model, files=(ReportFile("m-BF16.gguf", 10),))
    for outtype in ("f16", "bf16"):
        output = Output(f"m-{outtype.upper()}.gguf", Stamp(1, 2, 3))
        journal.record(f"convert {outtype}", Record.now({"outtype": outtype}, [output], "", 5.0))
    (step,) = describe_steps(journal, {}, None, model, "")
    assert step.command == "convert_hf_to_gguf.py Ministral-8B --outfile m-BF16.gguf --outtype bf16"
