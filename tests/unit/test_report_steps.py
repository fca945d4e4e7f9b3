"""Commands in a report: they can be typed again, and name no folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.files import Stamp
from imatrix_runner.imatrix.collection_facts import ImatrixInputs
from imatrix_runner.journal import Journal, StepOutput, StepRecord, commands_in
from imatrix_runner.report.document import ReportFile
from imatrix_runner.report.facts.gather_steps import bare_commands, describe_steps
from support.reports import sample_report


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
        ("imatrix-runner run m.gguf -- --foo 'a b' '&&'", "imatrix-runner run m.gguf -- --foo 'a b' '&&'"),
        (
            "imatrix-runner imatrix convert /i.gguf /i.dat && cd /w && llama-quantize --imatrix i.dat /w/m.gguf /w/o.gguf Q4_0",
            "imatrix-runner imatrix convert i.gguf i.dat && llama-quantize --imatrix i.dat m.gguf o.gguf Q4_0",
        ),
        ("imatrix-runner run '/home/ada/my model.gguf'", "imatrix-runner run 'my model.gguf'"),
        ("", ""),
        ("imatrix-runner run 'unclosed", ""),
        ("imatrix-runner run m\x1b[2J.gguf", "imatrix-runner run 'm\ufffd[2J.gguf'"),
    ],
)
def test_a_command_keeps_names_and_loses_folders(typed: str, shown: str) -> None:
    assert bare_commands(commands_in(typed)) == shown


def test_a_directory_that_looks_like_a_hub_id_is_known_by_having_been_the_source() -> None:
    assert bare_commands(commands_in("imatrix-runner run models/llama"), "models/llama") == "imatrix-runner run llama"
    assert bare_commands(commands_in("imatrix-runner run models/llama")) == "imatrix-runner run models/llama"


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
def test_an_imatrix_whose_command_was_not_kept_is_told_by_inputs(
    chunks: str, options: str, command: str, tmp_path: Path
) -> None:
    model = replace(sample_report().model, files=(ReportFile("mmproj-m-F16.gguf", 9), ReportFile("m-BF16.gguf", 10)))
    inputs = ImatrixInputs(
        model_file="m", calibration_text="t", context="512", chunks=chunks, options=options, engine="llama.cpp 1"
    ).named()
    record = StepRecord.now(inputs, [StepOutput("imatrix.gguf", Stamp(1, 2, 3))], "", 4.0, facts={"dataset": "my text.txt"})
    (step,) = describe_steps(Journal(tmp_path / "journal.json"), {}, record, model, "")
    assert (step.what, step.seconds, step.command) == ("imatrix", 4.0, command)


def test_a_conversion_is_told_if_the_levels_were_made_from_it(tmp_path: Path) -> None:
    journal, model = Journal(tmp_path / "journal.json"), replace(sample_report().model, files=(ReportFile("m-BF16.gguf", 10),))
    for outtype in ("f16", "bf16"):
        output = StepOutput(f"m-{outtype.upper()}.gguf", Stamp(1, 2, 3))
        journal.record(f"convert {outtype}", StepRecord.now({"outtype": outtype}, [output], "", 5.0))
    (step,) = describe_steps(journal, {}, None, model, "")
    assert step.command == "convert_hf_to_gguf.py Ministral-8B --outfile m-BF16.gguf --outtype bf16"
