"""A card that a person edited on the hub is merged with a new one: their words stay, untouched sections are renewed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.publish.card_merge import MOST_CHARACTERS, marked, merge_cards

FIRST = """---
base_model: org/model
license: apache-2.0
tags:
- gguf
- imatrix
---

# Model GGUF

Two levels.

## Files

| a | b |

## How to run it

```sh
# not a heading
llama-cli -m a
```

## How it was made

* with care
"""
NEW = (
    FIRST.replace("Two levels", "Three levels").replace("| a | b |", "| a | b | c |").replace("- imatrix", "- imatrix\n- more")
)


def on_hub(*changes: tuple[str, str]) -> str:
    card = marked(FIRST)
    for old, new in changes:
        assert old in card
        card = card.replace(old, new)
    return card


def test_an_untouched_card_is_replaced() -> None:
    assert merge_cards(NEW, marked(FIRST)).text == marked(NEW)
    assert merge_cards(NEW, marked(FIRST).replace("\n", "\r\n")).text == marked(NEW)
    assert merge_cards(FIRST, FIRST, FIRST).text == marked(FIRST)


def test_edits_additions_and_removals_stay_and_the_rest_is_renewed() -> None:
    edited = on_hub(
        ("* with care", "* with care and tea"),
        ("## Files", "## Notes of mine\n\nHello.\n\n## Files"),
        ("\n## How to run it\n\n```sh\n# not a heading\nllama-cli -m a\n```\n", ""),
        ("license: apache-2.0", "license: mit\nthumbnail: x.png"),
    )
    merged = merge_cards(NEW, edited)
    assert merged.warnings == ()
    expected = NEW.replace("* with care", "* with care and tea").replace("## Files", "## Notes of mine\n\nHello.\n\n## Files")
    expected = expected.replace("\n## How to run it\n\n```sh\n# not a heading\nllama-cli -m a\n```\n", "")
    expected = expected.replace("license: apache-2.0", "license: mit\nthumbnail: x.png")
    assert merged.text.partition("\n<!--")[0] == expected
    # And again, with nothing new from the person: nothing of theirs is lost.
    assert merge_cards(NEW, merged.text) == merged
    third = merge_cards(FIRST, merged.text)
    assert "* with care and tea" in third.text
    assert "## Notes of mine" in third.text
    assert "Two levels" in third.text
    assert "## How to run it" not in third.text
    assert "license: mit" in third.text


def test_where_both_changed_the_persons_stays_with_a_warning() -> None:
    merged = merge_cards(NEW, on_hub(("| a | b |", "| mine |"), ("- gguf", "- my-tag")))
    assert "| mine |" in merged.text
    assert "- my-tag" in merged.text
    assert "Three levels" in merged.text
    assert merged.warnings == (
        "The card keeps the metadata key 'tags' as it was edited on the hub; the new report has another.",
        "The card keeps the section 'Files' as it was edited on the hub; the new report has another.",
    )


def test_new_sections_follow_their_neighbours_and_old_ones_go() -> None:
    new = NEW.replace("## How it was made\n\n* with care\n", "").replace(
        "## How to run it", "## Prompt format\n\nx\n\n## How to run it"
    )
    merged = merge_cards(new, on_hub(("## How to run it", "## Mine\n\ny\n\n## How to run it")))
    headings = [line for line in merged.text.splitlines() if line.startswith("## ")]
    assert headings == ["## Files", "## Prompt format", "## Mine", "## How to run it"]


def test_a_retitled_card_keeps_its_title_and_its_first_lines() -> None:
    merged = merge_cards(NEW, on_hub(("# Model GGUF\n", "# My favourite model\n")))
    assert "# My favourite model\n\nTwo levels" in merged.text
    assert "# Model GGUF" not in merged.text
    assert [each for each in merged.warnings if "My favourite model" in each]


def test_lost_marks_are_replaced_by_the_last_published_card() -> None:
    lost = FIRST.replace("* with care", "* with tea")
    for base in (FIRST, marked(FIRST)):
        merged = merge_cards(NEW, lost, base)
        assert "* with tea" in merged.text
        assert "Three levels" in merged.text
    unknown = merge_cards(NEW, lost)
    assert "Two levels" in unknown.text
    assert any("written on the hub" in each for each in unknown.warnings)


def test_headings_in_code_and_comments_divide_nothing() -> None:
    tricky = "# T\n\n````md\n## no\n```\n## no\n````\n\n<!-- x\n## no\n-->\n\n~~~\n## no\n~~~\n"
    other = tricky.replace("x\n", "y\n")
    merged = merge_cards("# T\n\nnew\n", marked(tricky))
    assert merged.text.startswith("# T\n\nnew\n\n<!--")
    assert "## no" not in merged.text
    assert merge_cards(tricky, marked(tricky).replace("x\n## no", "y\n## no")).text.startswith(other.rstrip())


@pytest.mark.parametrize(
    "theirs",
    [
        "",
        "\ufeff---\n",
        "---\n---\n",
        "---\nx\n---",
        "no heading\n",
        "# \n## \n##\n",
        "```\nnever closed\n## x",
        "<!-- never closed",
        "\0\r\r\n",
    ],
)
def test_odd_cards(theirs: str) -> None:
    merged = merge_cards(NEW, theirs)
    assert merge_cards(NEW, merged.text).text == merged.text


def test_huge_cards_stay_as_they_are() -> None:
    for theirs in ("x" * (MOST_CHARACTERS + 1), "".join(f"## {n}\n" for n in range(3000))):
        merged = merge_cards(NEW, theirs)
        assert (merged.text, len(merged.warnings)) == (theirs, 1)


def test_a_parsed_card_of_the_hub() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(merge_cards(NEW, on_hub(("license: apache-2.0", "license: mit"))).text).data
    assert (data.license, data.base_model, data.tags) == ("mit", "org/model", ["gguf", "imatrix", "more"])


# Properties, over cards of a few sections.

PARTS = st.lists(
    st.tuples(st.sampled_from(["Files", "How", "Mine", "Notes"]), st.sampled_from(["a", "b", "```\n## x\n```"])), max_size=5
)


def card(parts: list[tuple[str, str]], licence: str) -> str:
    seen = dict(parts)
    return f"---\nlicense: {licence}\n---\n\n# T\n\n" + "".join(f"## {name}\n\n{text}\n\n" for name, text in seen.items())


CARDS = st.builds(card, PARTS, st.sampled_from(["mit", "other"]))


def split(text: str) -> dict[str, str]:
    body = text.partition("\n<!-- ")[0]
    return {
        part.partition("\n")[0]: part.strip()
        for part in ("\n" + body.replace("\n## x", "\n## x")).split("\n## ")[1:]
        if part[0] != "x"
    }


@given(CARDS, CARDS)
def test_what_nobody_touched_becomes_the_new_card(first: str, new: str) -> None:
    merged = merge_cards(new, marked(first))
    assert sorted(split(merged.text).items()) == sorted(split(new).items())
    assert merged.warnings == ()


@given(CARDS, CARDS, CARDS)
def test_a_merge_loses_nothing_of_the_persons_and_is_stable(first: str, new: str, edited: str) -> None:
    marks = "\n<!-- " + marked(first).rpartition("<!-- ")[2]
    merged = merge_cards(new, edited.rstrip() + "\n" + marks)
    was, theirs, result = split(first), split(edited), split(merged.text)
    for name, text in theirs.items():
        if was.get(name) != text:
            assert result[name] == text
    for name in was.keys() - theirs.keys():
        assert name not in result
    assert merge_cards(new, merged.text).text == merged.text


@given(st.text(max_size=300), st.text(max_size=300))
def test_any_text_merges_and_is_stable(ours: str, theirs: str) -> None:
    merged = merge_cards(ours, theirs)
    again = merge_cards(ours, merged.text)
    assert again.text == merged.text


def test_the_comment_is_valid_html(tmp_path: Path) -> None:
    comment = marked(FIRST).rstrip().rpartition("\n")[2]
    assert comment.startswith("<!-- ")
    assert "--" not in comment[4:-3]
