"""Every finding is reported with the figure that led to it, and only if it applies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.calibration.inspect.findings import UNRELATED, Inspection, TextFinding, text_findings
from imatrix_runner.calibration.inspect.inspection import Encoding, NearRepetition, Repetition, TextFacts
from imatrix_runner.calibration.inspect.languages import Domain, Similarity
from imatrix_runner.calibration.inspect.overlap import Overlap
from imatrix_runner.calibration.inspect.token_facts import SpecialToken, TokenFacts

NOTHING = Repetition(1000, 0, 0.0, (), False)
CLEAN = Encoding(bom=False, crlf=0, lf=5000, cr=0, replaced=0, mojibake=0, mojibake_example="", controls=0)
TEXT = TextFacts(
    path=Path("my text.txt"),
    n_bytes=250_000,
    sha256="0" * 64,
    n_lines=5000,
    n_characters=240_000,
    n_words=40_000,
    n_passages=600,
    n_documents=None,
    compression=2.2,
    domain_kind="",
    domains=(),
    similarities=(),
    scripts=(),
    languages=(),
    guessed=250_000,
    lines=NOTHING,
    passages=NOTHING,
    near=NearRepetition(600, 0, 0.0, (), True),
    encoding=CLEAN,
)
TOKENS = TokenFacts(
    model="model.gguf",
    n_ctx=512,
    n_tokens=70_000,
    n_chunks=136,
    n_plain=70_000,
    n_parsed=70_000,
    n_vocabulary=128_000,
    n_seen=15_000,
    bytes_per_token=3.5,
    parse_special="",
    special=(),
    trained_context=512,
)
MARKED = replace(TOKENS, special=(SpecialToken(7, "<|im_start|>", 40), SpecialToken(8, "<|im_end|>", 39)))


def findings_of(inspection: Inspection) -> dict[str, TextFinding]:
    found = text_findings(inspection)
    kinds = [finding.kind for finding in found]
    assert len(set(kinds)) == len(kinds)
    return {finding.kind: finding for finding in found}


def of_text(**changes: Any) -> dict[str, TextFinding]:
    return findings_of(Inspection(replace(TEXT, **changes), None, 512))


def of_tokens(tokens: TokenFacts, **changes: Any) -> dict[str, TextFinding]:
    return findings_of(Inspection(TEXT, tokens, tokens.n_ctx, **{"parse_special": tokens.parse_special, **changes}))


def test_a_good_text_gets_no_word() -> None:
    assert text_findings(Inspection(TEXT, TOKENS, 512)) == ()


@pytest.mark.parametrize(("n", "expected"), [(49, True), (50, False)])
def test_few_passages_are_noisy(n: int, expected: bool) -> None:
    found = of_text(n_passages=n)
    assert ("few-examples" in found) is expected
    if expected:
        assert found["few-examples"].severity == "warning"
        assert found["few-examples"].figure == 49
        assert "49 passages (blocks between blank lines) are few" in found["few-examples"].text


def test_documents_count_where_they_are_known() -> None:
    assert "3 documents are few" in of_text(n_documents=3)["few-examples"].text
    assert "few-examples" not in of_text(n_documents=50, n_passages=3)


@pytest.mark.parametrize(("n", "expected"), [(99, True), (100, False)])
def test_few_chunks_are_noisy(n: int, expected: bool) -> None:
    found = of_tokens(replace(TOKENS, n_chunks=n))
    assert ("few-chunks" in found) is expected
    if expected:
        assert "99 chunks of 512 tokens are few" in found["few-chunks"].text
        assert "about 512 tokens" in found["few-chunks"].todo


def test_chunks_without_a_model_are_called_an_estimate() -> None:
    found = of_text(n_bytes=4 * 512 * 99)["few-chunks"]
    assert "About 99 chunks of 512 tokens (estimated: 4 bytes per token)" in found.text
    assert "--model" in found.todo
    assert "few-chunks" not in of_text(n_bytes=4 * 512 * 100)


def test_a_short_context_is_worth_a_remark() -> None:
    found = of_tokens(replace(TOKENS, trained_context=8192))["short-context"]
    assert found.severity == "info"
    assert found.figure == 512
    assert "8,192" in found.text
    assert "no difference between 512 and 8192" in found.text
    assert "short-context" not in of_tokens(replace(TOKENS, trained_context=None))


def domains(*shares: float) -> tuple[Domain, ...]:
    return tuple(Domain(f"d{number}", int(250_000 * share), share) for number, share in enumerate(shares))


def test_one_source_alone_is_warned_of_and_none_known_is_not() -> None:
    found = of_text(domain_kind="source", domains=domains(1.0))["one-source"]
    assert found.severity == "warning"
    assert "one source (d0)" in found.text
    assert "one labelled part (d0)" in of_text(domain_kind="part", domains=domains(1.0))["one-source"].text
    assert of_text() == {}


def test_two_large_unrelated_domains_are_warned_of() -> None:
    pair = Similarity("d0", "d1", UNRELATED - 0.1)
    found = of_text(domain_kind="source", domains=domains(0.6, 0.4), similarities=(pair,))["unrelated-domains"]
    assert found.severity == "warning"
    assert found.figure == pytest.approx(0.4)
    assert "d0 and d1" in found.text
    assert "0.40" in found.text


def test_related_domains_and_small_ones_are_not_warned_of() -> None:
    alike = Similarity("d0", "d1", UNRELATED)
    assert of_text(domain_kind="source", domains=domains(0.6, 0.4), similarities=(alike,)) == {}
    apart = Similarity("d0", "d1", 0.1)
    assert of_text(domain_kind="source", domains=domains(0.8, 0.2), similarities=(apart,)) == {}


def test_the_large_pair_is_named_even_if_a_small_one_is_less_alike() -> None:
    pairs = (Similarity("d0", "d2", 0.1), Similarity("d0", "d1", 0.3))
    found = of_text(domain_kind="source", domains=domains(0.5, 0.4, 0.1), similarities=pairs)
    assert found["unrelated-domains"].figure == pytest.approx(0.3)


def test_many_domains_make_a_general_text() -> None:
    pair = Similarity("d0", "d1", 0.1)
    found = of_text(domain_kind="part", domains=domains(0.3, 0.3, 0.2, 0.1, 0.1), similarities=(pair,))
    assert list(found) == ["general-text"]
    assert found["general-text"].severity == "info"
    assert "5 labelled parts" in found["general-text"].text
    assert "0.10" in found["general-text"].text


@pytest.mark.parametrize(("share", "expected"), [(0.051, True), (0.05, False)])
def test_repetition_over_five_percent_is_warned_of(share: float, expected: bool) -> None:
    repeated = Repetition(1000, 60, share, (("again", 61),), False)
    assert ("repeated-lines" in of_text(lines=repeated)) is expected
    assert ("repeated-passages" in of_text(passages=repeated)) is expected
    near = NearRepetition(500, 30, share, (), False)
    found = of_text(near=near)
    assert ("near-duplicates" in found) is expected
    if expected:
        assert "5.1 %" in found["near-duplicates"].text
        assert "the first 500" in found["near-duplicates"].text


def test_what_repeats_exactly_is_not_told_again_as_nearly() -> None:
    repeated = Repetition(1000, 600, 0.6, (), False)
    found = of_text(lines=repeated, passages=repeated, near=NearRepetition(500, 300, 0.6, (), True))
    assert list(found) == ["repeated-lines"]


@pytest.mark.parametrize(("fold", "expected"), [(4.1, True), (4.0, False)])
def test_what_compresses_too_well_is_no_prose(fold: float, expected: bool) -> None:
    found = of_text(compression=fold)
    assert ("repetitive" in found) is expected
    if expected:
        assert "4.1-fold" in found["repetitive"].text


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        ({"replaced": 24}, "lost-characters", "24×"),
        ({"mojibake": 24, "mojibake_example": "dÃ©jÃ  vu"}, "mojibake", "dÃ©jÃ  vu"),
        ({"controls": 2400}, "control-characters", "2,400×"),
    ],
)
def test_damage_is_warned_of_and_single_cases_only_mentioned(changes: dict[str, Any], kind: str, expected: str) -> None:
    found = of_text(encoding=replace(CLEAN, **changes))[kind]
    assert found.severity == "warning"
    assert expected in found.text
    assert found.todo
    few = {name: 1 if isinstance(value, int) else value for name, value in changes.items()}
    assert of_text(encoding=replace(CLEAN, **few))[kind].severity == "info"


def test_a_byte_order_mark_and_mixed_line_ends_come_with_a_command() -> None:
    found = of_text(encoding=replace(CLEAN, bom=True, crlf=700, lf=4300))
    assert "sed -i" in found["bom"].todo
    assert "'my text.txt'" in found["bom"].todo
    assert found["mixed-line-ends"].severity == "warning"
    assert "700 CRLF, 4,300 LF" in found["mixed-line-ends"].text
    assert of_text(encoding=replace(CLEAN, crlf=3, lf=4997))["mixed-line-ends"].severity == "info"
    assert of_text(encoding=replace(CLEAN, crlf=5000, lf=0)) == {}


def test_control_tokens_that_stay_letters_are_warned_of() -> None:
    found = of_tokens(MARKED)["special-not-parsed"]
    assert found.severity == "warning"
    assert found.figure == 79
    assert "<|im_start|> 40×" in found.text
    assert "--parse-special" in found.todo


def test_control_tokens_that_are_parsed_are_only_mentioned_unless_built_so() -> None:
    asked = of_tokens(replace(MARKED, parse_special="--parse-special"))
    assert asked["special-parsed"].severity == "info"
    assert of_tokens(replace(MARKED, parse_special="manifest"), built=True) == {}


def test_a_stale_manifest_is_told() -> None:
    assert findings_of(Inspection(TEXT, None, 512, stale=True))["stale-manifest"].severity == "warning"


@pytest.mark.parametrize(
    ("overlap", "kind", "severity"),
    [
        (Overlap(0.25, 4000, 900, "…", 4000), "held-out-void", "error"),
        (Overlap(0.0, 0, 0, "", 0, identical=True), "held-out-void", "error"),
        (Overlap(0.05, 4000, 900, "…", 4000), "held-out-overlap", "warning"),
        (Overlap(0.001, 4000, 90, "…", 4000), "held-out-fresh", "info"),
        (Overlap(0.0, 0, 0, "", 0), "held-out-short", "warning"),
    ],
)
def test_overlap_with_a_held_out_text_is_reported(overlap: Overlap, kind: str, severity: str) -> None:
    found = findings_of(Inspection(TEXT, None, 512, overlap=overlap, held_out="held.txt"))
    assert list(found) == [kind]
    assert found[kind].severity == severity
    assert "held.txt" in found[kind].text
    if overlap.share >= 0.05:
        assert f"{100 * overlap.share:.0f} %" in found[kind].text


def test_the_worst_comes_first() -> None:
    overlap = Overlap(0.5, 4000, 900, "…", 4000)
    text = replace(TEXT, n_passages=3, compression=9.0)
    tokens = replace(TOKENS, trained_context=8192)
    severities = [each.severity for each in text_findings(Inspection(text, tokens, 512, overlap=overlap, held_out="h"))]
    assert severities == ["error", "warning", "warning", "info"]
