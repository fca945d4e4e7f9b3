"""Names of published files pass the rules of the hub, llama.cpp and Ollama; what does not is refused, with a fix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.levels import PRESETS, Level, preset_levels, resolve_levels
from imatrix_runner.engines.roundings import ROUNDINGS, STOCK
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.mixes.naming import mix_name
from imatrix_runner.models.hub.label_rules import (
    hub_label,
    is_model_for_llama_cpp,
    is_ollama_tag,
    llama_cpp_finds,
    llama_cpp_slug,
)
from imatrix_runner.publish.file_names import DEFAULT_TEMPLATE, NamedFile, PublishedFile, checked_names, published_level
from support.published_names import LABELS, MADE, NUMBERS, TYPES


def file(level: str, label: str, *, model: str = "Model", shards: int = 0) -> PublishedFile:
    return PublishedFile(f"{model}-{level}.gguf", level, model, NUMBERS.get(label), shards)


def of_level(level: Level, shards: int = 0) -> PublishedFile:
    kind = level.ftype.upper()
    return file(level.name, "BF16" if kind == "COPY" else kind, shards=shards)


def named(*files: PublishedFile, template: str = DEFAULT_TEMPLATE) -> tuple[NamedFile, ...]:
    return checked_names(files, template)


def test_the_facts_about_labels() -> None:
    assert {name: found.text if (found := hub_label(name)) else "" for name in LABELS} == LABELS


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_level_of_every_preset_is_found_by_its_own_label(preset: str, rounding: str, shards: int) -> None:
    levels, _ = preset_levels(preset, TYPES)
    if rounding != STOCK:
        levels = resolve_levels([f"{rounding}-{level.name}" for level in levels], TYPES)
    _check_found(named(*(of_level(level, shards) for level in levels)))


def _check_found(files: tuple[NamedFile, ...]) -> None:
    for each in files:
        for path in each.paths:
            found = hub_label(path)
            assert found is not None
            assert found.text == each.label == each.tag
        assert llama_cpp_slug(each.paths[0]) == each.tag.removeprefix("UD-")
        assert is_model_for_llama_cpp(each.paths[0])
        assert is_ollama_tag(each.tag.lower())
        # Where another file's path matches, too, a remark says so.
        others = [other for other in files if other is not each and llama_cpp_finds(other.paths[0], each.tag)]
        assert bool(others) == bool(each.remarks)


def test_stock_levels_mixes_and_roundings_of_one_type_fit_into_one_repository() -> None:
    files = named(
        file("IQ4_XS", "IQ4_XS"),
        file("REFINED-IQ4_XS", "IQ4_XS"),
        file("FEEDBACK-IQ4_XS", "IQ4_XS"),
        file("MIX-4.25bpw-IQ4_XS", "IQ4_XS"),
        file("FEEDBACK-MIX-4.2512bpw-2-IQ4_XS", "IQ4_XS"),
    )
    assert [each.paths[0].removeprefix("Model-") for each in files] == [
        "IQ4_XS.gguf",
        "IQ4_XS_REFINED.gguf",
        "IQ4_XS_FEEDBACK.gguf",
        "4.25bpw-IQ4_XS_MIX.gguf",
        "4.2512bpw-2-IQ4_XS_FEEDBACKMIX.gguf",
    ]
    _check_found(files)


@given(st.floats(1, 16), st.sampled_from(MADE), st.sampled_from(ROUNDINGS), st.integers(0, 12))
def test_every_mix_gets_a_label(bits: float, preset: str, rounding: str, shards: int) -> None:
    before = "" if rounding == STOCK else f"{rounding.upper()}-"
    _check_found(named(file(before + mix_name(bits, preset, ()), preset, shards=shards)))


@pytest.mark.parametrize(
    ("level", "label", "published"),
    [
        ("Q4_K_L", "Q4_K_M", "Q4_K_M_L"),
        ("Q5_K_L", "Q5_K_M", "Q5_K_M_L"),
        ("Q6_K_L", "Q6_K", "Q6_K_L"),
        ("Q2_K_L", "Q2_K", "Q2_K_L"),
        ("Q3_K_XL", "Q3_K_L", "Q3_K_XL"),
        ("FEEDBACK-Q3_K_XL", "Q3_K_L", "Q3_K_XL_FEEDBACK"),
        ("FEEDBACK-Q6_K_L", "Q6_K", "Q6_K_FEEDBACKL"),
        ("FEEDBACK-Q4_K_L", "Q4_K_M", "Q4_K_M_FEEDBACKL"),
        ("COPY", "BF16", "BF16"),
    ],
)
def test_what_distinguishes_a_level_stays_in_its_name(level: str, label: str, published: str) -> None:
    assert published_level(level, NUMBERS[label]) == published
    assert hub_label(f"Model-{published}.gguf") is not None


def test_shards_lie_in_a_folder_and_are_named_as_llama_gguf_split_does() -> None:
    (split,) = named(file("Q4_K_M", "Q4_K_M", shards=2))
    assert split.paths == tuple(f"Model-Q4_K_M/Model-Q4_K_M-0000{n}-of-00002.gguf" for n in (1, 2))


def test_other_files_keep_their_names_and_get_no_label() -> None:
    files = named(file("Q8_0", "Q8_0"), *map(PublishedFile, ("imatrix.gguf", "README.md", "mmproj-F16.gguf", "x.recipe.json")))
    assert [(each.paths, each.label) for each in files[1:]] == [((each.file.name,), "") for each in files[1:]]


def test_habits_of_publishers() -> None:
    levels = (file("IQ3_XXS", "IQ3_XXS"), file("Q4_K_M", "Q4_K_M"))
    for template, first in (
        ("{model}.i1-{level}", "Model.i1-IQ3_XXS.gguf"),
        ("{model}-i1-{level}", "Model-i1-IQ3_XXS.gguf"),
        ("org_{model}-{level}", "org_Model-IQ3_XXS.gguf"),
        ("{model}-UD-{level}", "Model-UD-IQ3_XXS.gguf"),
    ):
        assert named(*levels, template=template)[0].paths == (first,)
    (feedback,) = named(file("FEEDBACK-Q4_K_M", "Q4_K_M"), template="{model}-feedback-{label}")
    assert (feedback.paths, feedback.label) == (("Model-feedback-Q4_K_M.gguf",), "Q4_K_M")


def test_a_tag_that_ends_another_label_gets_a_remark() -> None:
    """llama.cpp searches for ``F16.``, which stands in ``BF16.gguf``, too."""
    half, brain = named(file("F16", "F16"), file("BF16", "BF16"))
    assert "--hf-file Model-F16.gguf" in half.remarks[0]
    assert brain.remarks == ()


def test_a_type_that_the_hub_does_not_know_gets_a_remark() -> None:
    (fork,) = named(PublishedFile("Model-IQ4_K.gguf", "IQ4_K", "Model", 137))
    assert fork.paths == ("Model-IQ4_K.gguf",)
    assert "no label for the file type 137" in fork.remarks[0]


@pytest.mark.parametrize(
    ("files", "template", "words"),
    [
        ([file("Q4_K_M", "Q4_K_M")], "{model}-{quant}", "{quant} is not a field"),
        ([file("Q4_K_M", "Q4_K_M")], "{model-{level}", "a brace in it"),
        ([file("Q4_K_M", "Q4_K_M")], "{model}-{level}-v2", "does not end with {level}"),
        ([file("Q4_K_M", "Q4_K_M")], "{model}", "does not end with {level}"),
        ([file("Q4_K_M", "Q4_K_M")], "gguf/{level}", "allows no '/'"),
        ([file("Q4_K_M", "Q4_K_M")], "{model}{level}", "do not find"),
        ([file("Q4_K_M", "Q4_K_M", model="a:b")], DEFAULT_TEMPLATE, "':'"),
        ([file("Q4_K_M", "Q4_K_M", model="-rf")], DEFAULT_TEMPLATE, "begins and ends"),
        ([file("Q4_K_M", "Q4_K_M", model="../..")], DEFAULT_TEMPLATE, "allows no '/'"),
        ([file("Q4_K_M", "Q4_K_M", model="a\x1bb")], DEFAULT_TEMPLATE, "Windows allows no"),
        ([file("Q4_K_M", "Q4_K_M", model="m" * 240)], DEFAULT_TEMPLATE, "200 characters"),
        ([file("Q4_K_M", "Q4_K_M", model="m" * 100, shards=2)], DEFAULT_TEMPLATE, "200 characters"),
        ([file("Q4_K_M", "Q4_K_M", model="字" * 90)], DEFAULT_TEMPLATE, "255 bytes"),
        ([file("Q4_K_M", "Q4_K_M", model="CON.x")], DEFAULT_TEMPLATE, "a device on Windows"),
        ([file("Q4_K_M", "Q4_K_M", model="Foo-imatrix")], DEFAULT_TEMPLATE, "for no model"),
        ([file("Q4_K_M", "Q4_K_M", shards=100_000)], DEFAULT_TEMPLATE, "99,999 shards"),
        ([file("Q4_K_M", "Q4_K_M"), file("FEEDBACK-Q4_K_M", "Q4_K_M")], "{level}{model}-{label}", "the label Q4_K_M"),
        ([file("MIX-4.2bpw-Q4_0", "Q4_0"), file("MIX-4.3bpw-Q4_0", "Q4_0")], DEFAULT_TEMPLATE, "the label Q4_0_MIX"),
        ([file("Q8_0", "Q8_0", model="A-Q4_0-B"), file("Q4_0", "Q4_0", model="A-Q4_0-B")], DEFAULT_TEMPLATE, "contains Q4_0"),
        ([file("Q8_0", "Q8_0"), PublishedFile("Q8.gguf")], DEFAULT_TEMPLATE, "takes 'Q8.gguf' for a model"),
        ([PublishedFile("Readme.md"), PublishedFile("README.md")], DEFAULT_TEMPLATE, "one file on Windows"),
        ([PublishedFile("../x.txt")], DEFAULT_TEMPLATE, "begins and ends"),
    ],
)
def test_what_breaks_a_rule_is_refused(files: list[PublishedFile], template: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        checked_names(files, template)
    assert any(part in f"{refused.value.what}. {refused.value.why}" for part in words.split("|"))
    assert refused.value.todo.endswith((".", "'"))


def test_a_name_that_disagrees_with_the_file_is_refused() -> None:
    for level in ("MIX-4bpw-IQ4_XS", "IQ4_XS", "FEEDBACK-IQ4_XS"):
        with pytest.raises(InvalidDataError, match=r"its name says IQ4_XS, and general\.file_type in the file says IQ4_NL"):
            named(file(level, "IQ4_NL"))


@given(st.text(max_size=60), st.sampled_from(MADE), st.integers(0, 3))
def test_any_model_name_gives_a_good_name_or_an_error(model: str, label: str, shards: int) -> None:
    try:
        (found,) = named(file(label, label, model=model, shards=shards))
    except UsageError:
        return
    _check_found((found,))
