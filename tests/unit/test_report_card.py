"""The model card: what the hub makes of its metadata, and what a Markdown reader makes of the rest, whoever named the model."""

from __future__ import annotations

import dataclasses
import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from imatrix_runner.evaluate.ab_verdict import RULE
from imatrix_runner.evaluate.recommendations import Pick
from imatrix_runner.models.hub.cards import CardFacts, front_matter
from imatrix_runner.report.document import Report, ReportFile
from imatrix_runner.report.views.card import render_card
from imatrix_runner.report.views.descriptions import describe
from imatrix_runner.report.views.markdown import MAX_BLOCK, code, fenced, inline, link
from imatrix_runner.safe_text import printable
from support.reports import (
    LOST,
    WON,
    bare_report,
    comparison,
    divergence,
    imatrix,
    level,
    mixed_report,
    moe_report,
    sample_report,
)

NASTY = (
    "x\" ': y\n---\nlicense: mit\n# head | cell `tick` <script>alert(1)</script> <!-- "
    "[l](javascript:a) ![i](http://evil.test/p) **b** _c_ ~~d~~ $$e$$ &lt; \\| \\(f\\) www.evil.test"
)
HOSTILE = (
    NASTY,
    "```\n~~~\n</details>\n\n## Buy\n\n| a |\n| - |\n",
    "!!python/object/apply:os.system [id]",
    "- [x] {{ 7 * 7 }} {% include '/etc/passwd' %} ${HOME} $(id) `id`",
    "\x1b[31m\x07\u202etxt\u2028new\u0085\ud800\x00",
    "norwegian: no",
    "../../../etc/passwd",
    "y" * 1_000_000,
)
"""Texts that a stranger may have put where a name is expected."""


def reader() -> MarkdownIt:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


def body_of(card: str) -> list[Token]:
    return reader().parse(ModelCard(card).text)


def flat(tokens: list[Token]) -> list[Token]:
    return [each for token in tokens for each in (token, *(token.children or ()))]


def headings(tokens: list[Token]) -> list[str]:
    return [f"{token.tag} {after.content}" for token, after in pairwise(tokens) if token.type == "heading_open"]


def rows(tokens: list[Token]) -> list[list[str]]:
    """The cells of every row of every table, as written."""
    found: list[list[str]] = []
    for token, after in pairwise(tokens):
        if token.type == "tr_open":
            found.append([])
        elif token.type in ("th_open", "td_open"):
            found[-1].append(after.content)
    return found


def shown(text: str) -> str:
    """What a reader sees of one line of Markdown; anything but text in it is an error."""
    inner = reader().parseInline(f"x {text} x")[0].children or []
    assert {token.type for token in inner} <= {"text", "text_special"}
    return "".join(token.content for token in inner)


def metadata(**known: Any) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard(front_matter(CardFacts("m", **known))).data.to_dict()
    return found


def spoiled(value: Any, text: str) -> Any:
    """The same value with ``text`` in the place of every text, but for words of ours."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = ("why", "verdict", "schema")
        names = [field.name for field in dataclasses.fields(value) if field.name not in kept]
        return dataclasses.replace(value, **{name: spoiled(getattr(value, name), text) for name in names})
    if isinstance(value, tuple):
        return tuple(spoiled(each, text) for each in value)
    return text if isinstance(value, str) else value


# The metadata


def test_the_hub_reads_what_the_report_knows_and_would_write_it_back_the_same() -> None:
    text = render_card(sample_report(quantized_by="somebody"))
    card = ModelCard(text)
    assert str(card) == text
    assert card.data.to_dict() == {
        "base_model": "example-org/Ministral-8B",
        "base_model_relation": "quantized",
        "model_name": "Ministral-8B",
        "quantized_by": "somebody",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "tags": ["gguf", "imatrix", "quantized", "conversational"],
    }


def test_what_is_not_known_is_left_out_of_the_metadata() -> None:
    data = ModelCard(render_card(bare_report())).data.to_dict()
    expected = {"model_name": "tiny", "library_name": "gguf", "pipeline_tag": "text-generation", "tags": ["gguf", "quantized"]}
    assert data == expected


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"license": "MIT"}, {"license": "mit"}),
        ({"license": "llama3.1", "license_name": "x"}, {"license": "llama3.1"}),
        (
            {"license": "Some Licence v2/3", "repo": "o/m", "license_link": "LICENSE.md"},
            {
                "license": "other",
                "license_name": "some-licence-v2-3",
                "license_link": "https://huggingface.co/o/m/blob/main/LICENSE.md",
            },
        ),
        (
            {"license": "other", "license_name": "Own Licence", "license_link": "https://example.org/l?a=(b)"},
            {"license": "other", "license_name": "Own Licence", "license_link": "https://example.org/l?a=(b)"},
        ),
        ({"license_name": "Own Licence"}, {"license": "other", "license_name": "Own Licence"}),
        ({"license": "other", "license_link": "javascript:alert(1)"}, {"license": "other"}),
        ({"license": "other", "license_link": "http://[", "repo": "o/m"}, {"license": "other"}),
        ({"license": "other", "license_link": "../x", "repo": "o/m"}, {"license": "other"}),
        ({"license": "other", "license_link": "LICENSE"}, {"license": "other"}),
        ({"license_link": "https://example.org/l"}, {}),
    ],
)
def test_a_licence_is_one_the_hub_knows_or_other_with_its_name_and_where_it_can_be_read(
    told: dict[str, str], expected: dict[str, str]
) -> None:
    assert {key: value for key, value in metadata(**told).items() if key.startswith("license")} == expected


def test_languages_are_codes_as_the_hub_wants_them() -> None:
    assert metadata(languages=("EN", "zh-CN", "zh_TW", "no", "Klingon", "", "x", "code"))["language"] == [
        "en",
        "zh",
        "no",
        "code",
    ]
    assert "language" not in metadata(languages=("English",))


def test_the_sources_tags_are_kept_but_for_those_that_no_longer_hold() -> None:
    tags = ("text-generation", "transformers", "region:us", "chat", "not-for-all-audiences", "chat", "\n")
    found = metadata(tags=tags, own_tags=("gguf",))
    assert found["tags"] == ["gguf", "chat", "not-for-all-audiences"]
    assert found["pipeline_tag"] == "text-generation"
    assert metadata(tags=("feature-extraction",))["pipeline_tag"] == "feature-extraction"


@pytest.mark.parametrize("repo", ["", "local-file.gguf", "a/b/c", "https://example.org", "o/m\nlicense: mit"])
def test_no_base_model_is_claimed_without_a_hub_id(repo: str) -> None:
    assert metadata(repo=repo).keys() & {"base_model", "base_model_relation"} == set()


# The page


def test_the_sections_of_a_card_of_which_everything_is_known() -> None:
    assert headings(body_of(render_card(sample_report()))) == [
        "h1 Ministral-8B GGUF",
        "h2 Which file to take",
        "h2 Files",
        "h2 Download and run",
        "h2 Prompt format",
        "h2 With and without the importance matrix",
        "h2 Answers compared with the source's",
        "h2 How it was measured",
        "h2 How it was made",
    ]


def test_a_card_of_which_little_is_known_claims_nothing() -> None:
    card = render_card(bare_report())
    assert headings(body_of(card)) == ["h1 tiny GGUF", "h2 Files", "h2 Download and run", "h2 How it was made"]
    rest = card.replace("imatrix-runner", "").replace("None of these files was measured;", "")
    for claim in ("KLD", "imatrix", "importance matrix", "Recommended", "Licence", "report.png", "None", "huggingface.co"):
        assert claim not in rest
    assert rest != card.replace("imatrix-runner", "")


def test_every_level_has_a_row_with_its_file_and_figures_largest_first() -> None:
    report = sample_report()
    files = rows(body_of(render_card(report)))[1 : 1 + len(report.levels)]
    assert [row[1] for row in files] == [each.name for each in report.levels]
    assert files[4][:7] == [
        "[Ministral-8B-Q4_K_M.gguf](./Ministral-8B-Q4_K_M.gguf)",
        "Q4_K_M",
        "4.57 GiB",
        "4.89",
        "0.0181 ± 0.0002",
        "92.6 %",
        "+1.13 %",
    ]


def test_recommended_files_come_first_with_their_rules() -> None:
    report = sample_report()
    card = render_card(report)
    before = card[: card.index("## Files")]
    for pick in report.picks:
        assert f"[{pick.level}](./Ministral-8B-{pick.level}.gguf)" in before
        assert pick.rule in before
    assert "](report.png)" in before


def test_the_picture_needs_two_measured_levels() -> None:
    made = tuple(
        dataclasses.replace(each, measured=None, ppl_ratio=None) if each.name != "Q6_K" else each
        for each in sample_report().levels
    )
    card = render_card(sample_report(levels=made, picks=(), comparisons=(), domain=()))
    assert "report.png" not in card
    assert "1 level measured against" in card
    assert rows(body_of(card))[1][4:7] == ["–", "–", "–"]


def test_comparisons_show_the_verdict_beside_its_rule() -> None:
    card = render_card(
        sample_report(comparisons=(comparison("Q4_K_M", 0.0181, 0.068), comparison("Q6_K", 0.002, 0.001)), domain=())
    )
    table = {row[0]: row[-1] for row in rows(body_of(card))[-2:]}
    assert table["Q4_K_M"] == "take it"
    assert table["Q6_K"] == "not needed (within two standard errors)"
    assert RULE in card


def test_answers_are_summed_up_without_anybodys_prompts() -> None:
    report = sample_report()
    card = render_card(report)
    assert "| Q4_K_M | 3 | 33.3 % |" in card
    assert not any(pair.prompt in card or pair.level in card for pair in report.domain[0].pairs)


def test_tensors_without_data_are_told() -> None:
    assert "Without data in the importance matrix: 1 tensor," in render_card(moe_report())


def test_a_published_matrix_names_its_publisher() -> None:
    weights = imatrix(made_here=False, calibration=None, origin="someone/m-GGUF@0f5c1d2:m.imatrix", datasets=("data.txt",))
    weights = dataclasses.replace(weights, repo="someone/m-GGUF")
    card = render_card(sample_report(imatrix=weights))
    assert "Importance matrix: a published one, 140 chunks of 512 tokens" in card
    assert "It is from [someone/m-GGUF@0f5c1d2:m.imatrix](https://huggingface.co/someone/m-GGUF)" in card
    assert "Calibration text: `data.txt`" in card


@pytest.mark.parametrize("text", ["a ``` b", "````\n```", "~~~", "\n\n# no heading\n\n\n\nend\n", "| a |\n| - |"])
def test_a_prompt_format_is_shown_whole_whatever_is_in_it(text: str) -> None:
    report = sample_report()
    card = render_card(dataclasses.replace(report, model=dataclasses.replace(report.model, prompt_format=text)))
    tokens = body_of(card)
    assert text.removesuffix("\n") + "\n" in [token.content for token in tokens if token.type == "fence"]
    assert headings(tokens) == headings(body_of(render_card(report)))


def test_a_prompt_format_beyond_all_measure_is_left_out_rather_than_cut() -> None:
    report = sample_report()
    card = render_card(
        dataclasses.replace(report, model=dataclasses.replace(report.model, prompt_format="x" * (MAX_BLOCK + 1)))
    )
    assert "Prompt format" not in card


def test_split_files_are_named_by_their_pattern_and_fetched_together() -> None:
    shards = tuple(ReportFile(f"big [1]-Q4_K_M-0000{n}-of-00002.gguf", 10) for n in (1, 2))
    split = dataclasses.replace(bare_report().levels[0], name="Q4_K_M", files=shards)
    card = render_card(bare_report(levels=(split,)))
    assert r"[big \[1\]-Q4_K_M-\*-of-00002.gguf](./big%20%5B1%5D-Q4_K_M-00001-of-00002.gguf)" in card
    assert "hf download OWNER/tiny-GGUF --include 'big [[]1]-Q4_K_M-*' --local-dir ." in card
    assert "llama-server -m 'big [1]-Q4_K_M-00001-of-00002.gguf'" in card


def test_one_file_runs_in_llama_cpp_ollama_and_lm_studio() -> None:
    """By the label that programs find it by, and from the disk; a level without such a label by its file alone."""
    card = render_card(sample_report(repo="me/Mine-GGUF"))
    for line in (
        "llama-server -hf me/Mine-GGUF:Q5_K_M",
        "ollama run hf.co/me/Mine-GGUF:Q5_K_M",
        "llama-server -m Ministral-8B-Q5_K_M.gguf",
        "lms import --copy --user-repo me/Mine-GGUF Ministral-8B-Q5_K_M.gguf",
    ):
        assert f"\n{line}\n" in card
    assert "ollama create ministral-8b:q5_k_m -f Modelfile" in card
    assert "`~/.lmstudio/models/me/Mine-GGUF/`" in card
    shards = tuple(ReportFile(f"big-Q4_K_M-0000{n}-of-00002.gguf", 10) for n in (1, 2))
    split = render_card(bare_report(levels=(dataclasses.replace(bare_report().levels[0], name="Q4_K_M", files=shards),)))
    assert "-hf OWNER/tiny-GGUF:Q4_K_M" in split
    assert "ollama run" not in split
    assert "Ollama loads no models in shards" in split
    other = dataclasses.replace(bare_report().levels[0], name="Q4_K_L", files=(ReportFile("big-Q4_K_L.gguf", 10),))
    assert "-hf" not in render_card(bare_report(levels=(other,)))


def test_commands_name_the_repository_where_it_is_known_and_else_a_stand_in_that_is_explained() -> None:
    known, unknown = render_card(sample_report(repo="me/Mine-GGUF")), render_card(sample_report())
    assert "hf download me/Mine-GGUF Ministral-8B-Q5_K_M.gguf --local-dir ." in known
    assert "OWNER" not in known
    assert "`OWNER/Ministral-8B-GGUF` stands for the name of this repository." in unknown


def test_a_maker_without_a_repository_is_the_owner_in_commands() -> None:
    card = render_card(sample_report(quantized_by="me"))
    assert "hf download me/Ministral-8B-GGUF " in card
    assert "OWNER/Ministral-8B-GGUF" in render_card(sample_report(quantized_by="Me & you"))


def test_a_fine_tune_of_a_known_model_names_it_as_such() -> None:
    report = sample_report()
    model = dataclasses.replace(report.model, base_models=(), repo="", tuned_from="org/base")
    front = ModelCard(render_card(dataclasses.replace(report, model=model))).data.to_dict()
    assert (front["base_model"], front["base_model_relation"]) == ("org/base", "finetune")
    front = ModelCard(render_card(report)).data.to_dict()
    assert (front["base_model"], front["base_model_relation"]) == ("example-org/Ministral-8B", "quantized")


def test_the_importance_matrix_next_to_the_levels_is_linked() -> None:
    report = sample_report()
    assert report.imatrix is not None
    assert f"Importance matrix: [{report.imatrix.file.name}](./{report.imatrix.file.name})" in render_card(report)
    elsewhere = dataclasses.replace(report.imatrix, made_here=False, origin="")
    assert "Importance matrix: [" not in render_card(dataclasses.replace(report, imatrix=elsewhere))


def test_a_projector_is_told_of() -> None:
    report = bare_report()
    model = dataclasses.replace(report.model, files=(*report.model.files, ReportFile("mmproj-tiny-F16.gguf", 5)))
    assert "[mmproj-tiny-F16.gguf](./mmproj-tiny-F16.gguf)" in render_card(dataclasses.replace(report, model=model))


def test_sections_are_apart_by_one_empty_line() -> None:
    for report in (sample_report(), moe_report(), bare_report(), sample_report(picks=(), comparisons=(), steps=(), command="")):
        for repo in ("", "a/b"):
            card = render_card(dataclasses.replace(report, repo=repo))
            assert "\n\n\n" not in card
            assert card.endswith("\n")
            assert not card.endswith("\n\n")


# Strangers' texts


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("make", [sample_report, moe_report, bare_report])
def test_no_text_of_a_stranger_becomes_markup_metadata_or_a_command(make: Any, text: str) -> None:
    report: Report = make()
    card = render_card(spoiled(report, text))
    parsed = ModelCard(card)
    assert str(parsed) == card
    assert parsed.data.to_dict().keys() <= {
        *ModelCard(render_card(sample_report())).data.to_dict(),
        "quantized_by",
        "license_name",
    }
    assert parsed.data.get("license") in (None, "other")
    tokens = body_of(card)
    assert [each.split()[0] for each in headings(tokens)] == ["h1", *["h2"] * (len(headings(tokens)) - 1)]
    assert set(headings(tokens)[1:]) <= set(headings(body_of(render_card(sample_report()))))
    good = rows(body_of(render_card(report)))
    assert [len(row) for row in rows(tokens)] == [len(row) for row in good]
    markup = {token.content.strip() for token in flat(tokens) if token.type.startswith("html")}
    assert markup <= {"<details>\n<summary>The command of every step</summary>", "</details>"}
    addresses = [str(token.attrs["href"]) for token in flat(tokens) if token.type == "link_open"]
    assert all(each.startswith(("./", "#how", "https://github.com/ggml-org/llama.cpp")) for each in addresses)
    assert [str(token.attrs["src"]) for token in flat(tokens) if token.type == "image"] in ([], ["report.png"])
    assert not [sign for sign in card if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t"]
    assert not set(card) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert len(card) < 200_000


ANYTHING = st.text(st.one_of(st.sampled_from("\\`*_[]()<>|&$~#!:-+.=\"'{}/@\n w1;"), st.characters()), max_size=60)


@given(ANYTHING)
def test_an_escaped_text_reads_as_it_is(text: str) -> None:
    plain = printable(" ".join(text.split()))
    assert shown(inline(text)).split() == ["x", *plain.split(), "x"]
    assert rows(reader().parse(f"| a | b | c |\n| - | - | - |\n| 1 | {inline(text)} | 3 |\n"))[1][::2] == ["1", "3"]
    address = reader().parseInline(link(text, f"./{text}"))[0].children or []
    assert [token.type for token in address if token.type not in ("text", "text_special")] == ["link_open", "link_close"]


def test_the_hub_finds_no_formula_in_a_strangers_text() -> None:
    """It looks for ``$$`` and ``\\\\(`` before it reads Markdown."""
    escaped = inline(r"$$x$$ \(y\) \(z\) \\[u\\]")
    assert "$$" not in escaped
    assert "\\(" not in escaped


@given(ANYTHING)
def test_code_holds_any_text(text: str) -> None:
    plain = printable(" ".join(text.split()))
    if plain:
        span = reader().parseInline(f"x {code(text)} x")[0].children or []
        assert [token.content for token in span if token.type == "code_inline"] == [plain]
    (block,) = reader().parse(fenced(text))
    assert block.type == "fence"


# Who should take what


def test_a_level_that_another_beats_says_so() -> None:
    made = (level("Q4_0", 4.6, 0.05), level("IQ4_XS", 4.4, 0.02), level("Q4_K_S", 4.6, 0.0201))
    told = describe(made)
    assert told["Q4_0"] == "IQ4_XS is smaller and closer to the source."
    assert told["Q4_K_S"] == "IQ4_XS is smaller and as close to the source."
    assert told["IQ4_XS"] == "A fair trade of size for closeness."


def test_two_files_of_one_size_do_not_point_at_each_other() -> None:
    told = describe((level("Q2_K", 3.0, 0.02), level("Q2_K_S", 3.0, 0.02)))
    assert set(told.values()) == {"A fair trade of size for closeness."}


def test_measurements_decide_what_is_said_of_a_level() -> None:
    made = (level("Q8_0", 8.5, 0.0008), level("Q4_K_M", 4.9, 0.018), level("IQ2_M", 2.9, 0.26))
    told = describe(made, (Pick("quality", "Q8_0", "a rule"),))
    assert told["Q8_0"] == "Recommended for quality."
    assert told["IQ2_M"] == "For where nothing larger fits: 28 % of the time another token is likeliest."
    assert divergence(0.26).same_top.value == pytest.approx(0.72, abs=0.005)


def test_unmeasured_levels_are_described_by_what_llama_cpp_says() -> None:
    made = (level("Q5_K_S", 5.5, None), level("Q4_K_L", 5.0, None), level("IQ3_XS", 3.3, None), level("NEW_7", 7.0, None))
    assert describe(made) == {
        "Q5_K_S": "Close to the source, a little smaller than Q5_K_M. +0.1 perplexity on Llama-3-8B.",
        "Q4_K_L": "Q4_K_M with token embeddings and output weights in Q8_0.",
        "IQ3_XS": "For where 4 bits do not fit.",
        "NEW_7": "",
    }


def test_fallbacks_are_told() -> None:
    made = (dataclasses.replace(level("Q4_K_M", 4.9, 0.02), fallbacks=1, fallback_share=0.5),)
    assert describe(made)["Q4_K_M"].endswith(
        "1 tensor has another type (50.0 % of the weights): the rows do not divide into this one's blocks."
    )


def test_a_mix_is_described_by_its_types_and_not_by_the_level_that_it_is_taken_for() -> None:
    mixed = mixed_report()
    said = describe(mixed.levels, mixed.picks)
    assert "Types by measured sensitivity: 0.61 ± 0.03 of Q4_K_M's KLD on the calibration text." in said[WON]
    unmeasured = [dataclasses.replace(each, measured=None) for each in mixed.levels]
    assert describe(unmeasured)[LOST] == "Types by measured sensitivity: 0.93 ± 0.02 of Q3_K_M's KLD on the calibration text."


def test_the_card_says_how_mixes_were_chosen_and_how_llama_quantize_makes_them() -> None:
    mixed = mixed_report()
    commands = {
        each.name: f"llama-quantize --tensor-type-file {each.name}.txt model.gguf {each.name}.gguf"
        for each in mixed.levels
        if each.mix is not None
    }
    made = tuple(dataclasses.replace(each, command=commands.get(each.name, each.command)) for each in mixed.levels)
    card = render_card(dataclasses.replace(mixed, levels=made))
    assert "h2 How the types of mixes were chosen" in headings(body_of(card))
    assert f"* **{WON}**: KLD on other chunks of that text 0.61 ± 0.03 of Q4_K_M, 0.65 in the typical chunk;" in card
    assert "; on held_out.txt, at its size, 0.62 ± 0.02 of Q4_K_M, 0.66 in the typical chunk; tensors by type: 120 Q4_K" in card
    assert "(./Ministral-8B-MIX-4.89bpw-Q4_K_M.recipe.json)" in card
    assert "\n".join(commands.values()) in card


def test_a_command_with_an_option_for_every_tensor_is_not_repeated() -> None:
    mixed = mixed_report()
    made = tuple(
        dataclasses.replace(each, mix=dataclasses.replace(each.mix, tensor_types=None)) if each.mix is not None else each
        for each in mixed.levels
    )
    assert "makes the same bytes" not in render_card(dataclasses.replace(mixed, levels=made))


def test_mixes_without_iq_types_are_not_called_slow() -> None:
    """What counts is what is in the file, not the level that it is named for."""
    (slow,) = [each for each in mixed_report().levels if each.name == LOST]
    assert slow.mix is not None
    quick = dataclasses.replace(slow, mix=dataclasses.replace(slow.mix, types={"Q4_K": 226}))
    for mix, told in ((slow, True), (quick, False)):
        assert ("IQ levels are slower" in render_card(dataclasses.replace(mixed_report(), levels=(mix,)))) == told
