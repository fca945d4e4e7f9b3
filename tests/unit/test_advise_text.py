"""Whether a text suits a model and a use, what of a text is timed, and GPUs as tools name them."""

from __future__ import annotations

from typing import Any

import pytest

from imatrix_runner.advise.text_suitability import Suitability, suits, tokens_per_expert
from imatrix_runner.advise.timing_probe import Timing, ranges
from imatrix_runner.calibration.inspect.inspection import LanguageShare
from imatrix_runner.engines.jobs import ChunkRange
from imatrix_runner.toolchain.hardware import Gpu, parse_gpus

ENGLISH = LanguageShare("en", "English", 600, 0.6)
CODE = LanguageShare("code", "code or data", 300, 0.3)
GERMAN = LanguageShare("de", "German", 50, 0.05)
SHORT = LanguageShare("short", "too short to tell", 50, 0.05)


def facts(**changes: Any) -> Suitability:
    usual: dict[str, Any] = {
        "model": "my model.gguf",
        "use": "general",
        "has_template": True,
        "rendered": False,
        "languages": (ENGLISH, CODE, GERMAN, SHORT),
        "n_tokens": 140_000,
    }
    return Suitability(**{**usual, **changes})


class TestTheUse:
    def test_a_dense_model_for_general_use_asks_for_nothing(self) -> None:
        assert suits(facts()) == ()

    @pytest.mark.parametrize(
        ("template", "rendered", "kind", "severity"),
        [(False, False, "no-template", "warning"), (True, False, "not-rendered", "info"), (True, True, "rendered", "info")],
    )
    def test_chat_looks_at_the_template(self, template: bool, rendered: bool, kind: str, severity: str) -> None:
        (found,) = suits(facts(use="chat", has_template=template, rendered=rendered))
        assert (found.kind, found.severity) == (kind, severity)

    def test_what_is_not_proven_is_not_promised(self) -> None:
        (found,) = suits(facts(use="chat"))
        assert "not proven" in found.text
        assert "--model 'my model.gguf'" in found.todo

    def test_code_looks_at_the_share_of_code(self) -> None:
        (found,) = suits(facts(use="code"))
        assert (found.kind, found.severity, found.figure) == ("code-share", "info", 0.3)
        (found,) = suits(facts(use="code", languages=(ENGLISH,)))
        assert (found.severity, found.figure) == ("warning", 0)

    def test_multilingual_looks_at_all_but_the_first_language(self) -> None:
        (found,) = suits(facts(use="multilingual"))
        assert (found.severity, found.figure) == ("warning", 0.05)
        assert "1 languages other than English" in found.text
        (found,) = suits(facts(use="multilingual", languages=(ENGLISH, LanguageShare("fr", "French", 400, 0.4))))
        assert found.severity == "info"
        (found,) = suits(facts(use="multilingual", languages=(CODE,)))
        assert found.severity == "warning"


class TestExperts:
    def test_each_gets_its_share_of_the_tokens(self) -> None:
        assert tokens_per_expert(143_360, 128, 8) == 8960
        (found,) = suits(facts(n_experts=128, n_used=8))
        assert (found.kind, found.severity, found.figure) == ("expert-tokens", "info", 8750)

    def test_too_few_are_a_warning(self) -> None:
        (found,) = suits(facts(n_experts=1024, n_used=1, n_tokens=60_000))
        assert (found.kind, found.severity, found.figure) == ("few-expert-tokens", "warning", 58)

    @pytest.mark.parametrize("used", [0, -3, 9])
    def test_a_model_that_says_nonsense_is_not_judged(self, used: int) -> None:
        assert suits(facts(n_experts=8, n_used=used)) == ()


class TestTheProbe:
    def test_two_pairs_of_chunks_as_far_as_the_text_goes(self) -> None:
        pair, next_ = ChunkRange(0, 2), ChunkRange(2, 2)
        assert ranges(10_000, 512) == (pair, next_)
        assert ranges(4 * 512, 512) == (pair,)  # llama-imatrix would not start at chunk 2
        assert ranges(4 * 512 + 1, 512) == (pair, next_)
        assert ranges(2 * 512, 512) == (pair,)
        assert ranges(2 * 512 - 1, 512) == ()

    def test_the_second_pair_counts_and_both_tell_the_error(self) -> None:
        timing = Timing(3.0, 2.0, 10.0)
        assert timing.seconds_per_chunk == 2.0
        assert timing.expected(100) == 210.0
        assert timing.apart == 0.5

    def test_a_pair_alone_has_no_error(self) -> None:
        assert Timing(3.0, None, 1.0).apart is None
        assert Timing(3.0, None, 1.0).expected(10) == 31.0


def test_gpus_have_a_name_and_perhaps_a_memory() -> None:
    assert parse_gpus(("NVIDIA H200 (143771 MiB)",)) == (Gpu("NVIDIA H200", 143771 << 20),)
    assert parse_gpus(("Apple M3 Max (Metal)", "AMD Instinct MI300X")) == (
        Gpu("Apple M3 Max (Metal)"),
        Gpu("AMD Instinct MI300X"),
    )
    (found,) = parse_gpus(("CUDA0: NVIDIA H200 (143771 MiB, 143041 MiB free)",))
    assert found == Gpu("NVIDIA H200", 143771 << 20, 143041 << 20, "CUDA0")
    assert parse_gpus(()) == ()


def test_a_gpu_that_two_backends_see_is_one() -> None:
    lines = ("CUDA0: A (8 MiB, 7 MiB free)", "CUDA1: A (8 MiB, 7 MiB free)", "Vulkan0: A (8 MiB, 7 MiB free)")
    assert [gpu.device for gpu in parse_gpus(lines)] == ["CUDA0", "CUDA1"]
