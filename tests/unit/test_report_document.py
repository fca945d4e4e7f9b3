"""``report.json`` is a contract: what it holds, and that it comes back as it was written."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.report.document import MOST_BYTES, SCHEMA, VERSION, Report, encode_report, read_report
from support.reports import bare_report, moe_report, sample_report

SCHEMA_FILE = Path(__file__).with_name("report_schema.json")


def current_schema() -> dict[str, Any]:
    """JSON Schema of a report; what a field means is told in the descriptions."""
    schema: dict[str, Any] = json.loads(json.dumps(msgspec.json.schema(Report)))
    for found in schema["$defs"].values():
        found["description"] = inspect.cleandoc(found.get("description", ""))  # as Python 3.13 keeps docstrings, too
    return schema


def test_the_schema_is_the_reviewed_one() -> None:
    """A key that goes or changes its meaning breaks whoever reads reports; a new one with a default does not. Where a change is
    meant, renew the file with ``PYTHONPATH=tests python tests/unit/test_report_document.py`` and review what differs."""
    assert current_schema() == json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def test_only_what_version_1_began_with_is_required() -> None:
    """Whoever adds a field gives it a default, else reports of yesterday cannot be read."""
    required = {name: found["required"] for name, found in current_schema()["$defs"].items() if found.get("required")}
    assert required["Report"] == ["model", "levels", "made", "program"]
    assert required["ReportModel"] == [
        *("name", "architecture", "n_params", "n_bytes", "type", "origin", "files", "fingerprint"),
    ]
    assert "measured" not in required["ReportLevel"]


@pytest.mark.parametrize("make", [sample_report, moe_report, bare_report])
def test_a_report_comes_back_as_it_was(make: Callable[[], Report], tmp_path: Path) -> None:
    report = make()
    path = tmp_path / "report.json"
    path.write_bytes(encode_report(report))
    assert read_report(path) == report


def test_it_is_readable_json_with_fractions_as_keys() -> None:
    text = encode_report(sample_report()).decode()
    document = json.loads(text)
    assert (document["schema"], document["version"]) == ("imatrix-runner/report", 1) == (SCHEMA, VERSION)
    assert set(document["levels"][0]["measured"]["kld_at"]) >= {"0.5", "0.99", "1.0"}
    assert text.startswith('{\n  "model": {\n    "name"')
    assert text.endswith("}\n")


def test_keys_of_later_programs_are_passed_over(tmp_path: Path) -> None:
    document = json.loads(encode_report(bare_report()))
    document["weather"] = "fine"
    document["model"]["colour"] = "blue"
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert read_report(path) == bare_report()


def changed(**keys: Any) -> bytes:
    return json.dumps({**json.loads(encode_report(bare_report())), **keys}).encode()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "cut short"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not valid UTF-8"),
        (b"[1, 2]", "it is array, not object"),
        (b'{"schema": "imatrix-runner/run", "version": 1}', "imatrix-runner/run"),
        (b'{"schema": "evil\\u001b[2J"}', "evil\ufffd[2J"),
        (b"{}", "schema"),
        (changed(version=2), "version 2"),
        (changed(levels=[{"name": "Q4_0"}]), "$.levels[0] has no field 'ftype'"),
        (changed(made=3), "$.made"),
        (changed()[:-40], "cut short"),
        (changed(program="PROGRAM").replace(b"PROGRAM", b"\xff"), "not valid UTF-8"),
    ],
)
def test_what_is_no_report_is_refused_with_a_reason(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(InvalidDataError) as caught:
        read_report(path)
    assert str(path) in caught.value.what
    assert why in caught.value.why
    assert caught.value.why.isprintable()
    assert "imatrix-runner report" in caught.value.todo


def test_a_file_too_large_for_a_report_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with path.open("wb") as handle:
        handle.truncate(MOST_BYTES + 1)
    with pytest.raises(InvalidDataError, match="larger than 64 MiB"):
        read_report(path)


def test_a_report_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="No such file"):
        read_report(tmp_path / "report.json")


def test_samples_hold_what_their_names_say() -> None:
    """The reports that the views are tested with: were they empty, those tests would show nothing."""
    sample, moe, bare = sample_report(), moe_report(), bare_report(quantized_by="somebody")
    assert len([level for level in sample.levels if level.measured]) == 10
    assert {pair.verdict for pair in sample.comparisons} == {"not needed", "take it", "do not go without"}
    assert sample.imatrix is not None
    assert len(sample.imatrix.tensors) == 32 * 7 + 1
    assert moe.imatrix is not None
    assert any(each.without_tokens for each in moe.imatrix.experts)
    assert bare.imatrix is None
    assert not bare.picks
    assert bare == replace(bare_report(), quantized_by="somebody")


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(current_schema(), indent=2) + "\n", encoding="utf-8")
