"""``batch run --cluster``: models side by side on the workers of a real Ray cluster, with the files of one machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.batches import write_list
from support.command_line import RunCommand
from support.tiny_models import sample_text, write_llama_gguf

pytest.importorskip("ray")

LANES = 2


def test_each_worker_computes_a_model_of_its_own(tmp_path: Path, runner: RunCommand) -> None:
    """Three models on two workers: imatrix and levels are those of a batch without a cluster."""
    sources = [write_llama_gguf(tmp_path / f"m{seed}-BF16.gguf", fluent=True, seed=seed) for seed in range(3)]
    (text := tmp_path / "text.txt").write_text(sample_text(6000), encoding="utf-8")
    made = {}
    for folder, spread in ((tmp_path / "one", ()), (tmp_path / "many", ("--cluster", f"local:{LANES}"))):
        folder.mkdir()
        file = write_list(
            folder / "m.yaml", [str(path) for path in sources], levels="Q4_0,IQ3_S", calibration=str(text), chunks=4, threads=1
        )
        done = runner("batch", "run", file, *spread, "--json", cwd=folder)
        assert done.code == 0, done.err
        files = sorted((folder / "work").rglob("*.gguf"))
        made[bool(spread)] = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    assert done.document["plan"]["lanes"] == LANES
    began = [json.loads(line) for line in (folder / "m.yaml.batch" / "journal.jsonl").read_text().splitlines()]
    assert {event["compute_lane"] for event in began if event.get("stage") == "make" and "compute_lane" in event} == {0, 1}
    assert len(made[False]) == 9
    assert made[True] == made[False]
