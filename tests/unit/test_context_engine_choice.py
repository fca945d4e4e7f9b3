"""Which engine computes: the embedded one wherever it can serve, the programs where only they can, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imatrix_runner.context import engine_choice as choice_module
from imatrix_runner.context.engine_choice import EngineChoice, EngineNeeds, Machine, choose
from imatrix_runner.engines.embedded.bindings import Bindings, UnusableBindings
from imatrix_runner.errors import ToolchainError, UsageError
from imatrix_runner.toolchain.hardware import likes_bf16, may_have_gpu
from imatrix_runner.toolchain.locate import ENV_VARIABLE, Found
from imatrix_runner.toolchain.probe import Rejection, Toolchain
from support.values import fake_toolchain, quant_types

GPU = "CUDA0: NVIDIA H200 (143771 MiB, 143041 MiB free)"
BINDINGS = Bindings(
    version="0.3.36",
    python=Path("/python"),
    library=None,
    directory=Path("/lib"),
    digest="ab" * 32,
    ggml="0.25.3 0c1e570",
    features="CPU : AVX2 = 1",
    devices=(),
    backends=("cpu",),
    ftypes={"MOSTLY_Q4_K_M": 15, "MOSTLY_IQ2_XS": 20},
    origin="its own libraries",
)
MISSING = UnusableBindings(
    "llama-cpp-python is not installed for /python", "Type: pip install llama-cpp-python", installed=False
)
NOTHING = EngineNeeds()
BROKEN = UnusableBindings("its libraries do not load", "Reinstall it.")


@dataclass
class Here:
    """A machine, and whether its programs were looked for."""

    bindings: Bindings | UnusableBindings
    toolchain: Toolchain | None
    gpu: bool = False
    looked: int = 0

    def choose(
        self,
        asked: str = "auto",
        needs: EngineNeeds = NOTHING,
        *,
        llama_cpp: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> EngineChoice:
        machine = Machine(llama_cpp, env or {})
        machine.__dict__.update(bindings=self.bindings, may_have_gpu=self.gpu)
        return choose(asked, needs, machine)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """llama-cpp-python and programs, both for the CPU."""
    here = Here(BINDINGS, fake_toolchain())

    def locate(*_: object, **__: object) -> Found:
        here.looked += 1
        turned_down = () if here.toolchain else (Rejection(Path("/bin"), "PATH", "llama-quantize is not there"),)
        return Found(here.toolchain, turned_down)

    monkeypatch.setattr(choice_module, "locate", locate)
    return here


class TestAuto:
    def test_the_embedded_engine_is_the_default_and_nothing_else_is_looked_for(self, here: Here) -> None:
        choice = here.choose(needs=EngineNeeds(("Q4_K_M", "q4_k_l")))
        assert choice.name == "embedded"
        assert choice.notice is not None
        assert choice.notice.level == "detail"
        assert choice.notice.text == "Engine: embedded, llama-cpp-python 0.3.36 (its own libraries)"
        assert here.looked == 0

    @pytest.mark.parametrize("option", ["--llama-cpp", ENV_VARIABLE])
    def test_named_programs_are_used(self, here: Here, option: str) -> None:
        by_option = option == "--llama-cpp"
        choice = here.choose(llama_cpp=Path("/tools") if by_option else None, env={} if by_option else {option: "/tools"})
        assert choice.toolchain is here.toolchain
        assert said(choice) == f"info: Engine: binaries, because {option} names the llama.cpp programs to use."

    def test_options_for_llama_imatrix_need_it(self, here: Here) -> None:
        choice = here.choose(needs=EngineNeeds(extra=("--rope-scaling", "yarn")))
        assert said(choice) == "info: Engine: binaries, because --rope-scaling after -- is an option for llama-imatrix."

    def test_a_gpu_that_only_the_programs_see_is_used(self, here: Here) -> None:
        here.toolchain, here.gpu = fake_toolchain(devices=(GPU,)), True
        assert said(here.choose()).startswith(f"info: Engine: binaries, because only they can use the GPU ({GPU})")
        assert here.choose(needs=EngineNeeds(n_gpu_layers="0")).name == "embedded"
        here.bindings = replace(BINDINGS, devices=(GPU,), backends=("cpu", "cuda"))
        assert here.choose().name == "embedded"

    def test_a_machine_without_a_gpu_s_device_files_is_not_searched_for_one(self, here: Here) -> None:
        here.toolchain = fake_toolchain(devices=(GPU,))
        assert here.choose().name == "embedded"
        assert here.looked == 0

    def test_programs_without_a_gpu_are_no_better(self, here: Here) -> None:
        here.gpu = True
        assert here.choose().name == "embedded"
        here.toolchain = None
        assert here.choose().name == "embedded"

    @pytest.mark.parametrize("asked", ["auto", "embedded"])
    def test_a_fork_makes_its_own_types_beside_the_pass(self, asked: str, here: Here) -> None:
        here.toolchain = fake_toolchain(types=quant_types("Q4_K_M", "IQ4_KS"))
        choice = here.choose(asked, EngineNeeds(("Q4_K_M", "iq4_ks")))
        assert (choice.name, choice.toolchain, choice.additional) == ("embedded", None, here.toolchain)
        assert said(choice) == "info: iq4_ks: made by /tools, because only these programs offer it."
        assert here.choose(asked, EngineNeeds(("Q4_K_M",))).additional is None

    def test_a_named_fork_makes_everything(self, here: Here) -> None:
        here.toolchain = fake_toolchain(types=quant_types("Q4_K_M", "IQ4_KS"))
        choice = here.choose(needs=EngineNeeds(("Q4_K_M", "iq4_ks")), llama_cpp=Path("/tools"))
        assert (choice.name, choice.toolchain, choice.additional) == ("binaries", here.toolchain, None)

    def test_a_type_nobody_offers_is_for_the_levels_to_refuse(self, here: Here) -> None:
        choice = here.choose(needs=EngineNeeds(("Q4_KM",)))
        assert (choice.name, choice.additional) == ("embedded", None)

    def test_a_broken_installation_is_told_with_its_remedy(self, here: Here) -> None:
        here.bindings = BROKEN
        assert said(here.choose()) == "warning: Engine: binaries, because its libraries do not load. Reinstall it."

    def test_without_llama_cpp_python_the_programs_compute_in_silence(self, here: Here) -> None:
        here.bindings = MISSING
        choice = here.choose()
        assert choice.name == "binaries"
        assert choice.notice is None

    @pytest.mark.parametrize(("bindings", "pip"), [(MISSING, "pip install llama-cpp-python "), (BROKEN, "--force-reinstall")])
    def test_with_neither_both_ways_are_named(self, here: Here, bindings: UnusableBindings, pip: str) -> None:
        here.bindings, here.toolchain = bindings, None
        with pytest.raises(ToolchainError) as caught:
            here.choose()
        assert caught.value.exit_code == 3
        assert bindings.why in caught.value.why
        assert "llama-quantize is not there" in caught.value.why
        assert pip in caught.value.todo
        assert "imatrix-runner tools build" in caught.value.todo

    def test_programs_that_are_needed_and_missing_are_asked_for_with_the_reason(self, here: Here) -> None:
        here.toolchain = None
        with pytest.raises(ToolchainError, match="--foo after -- is an option for llama-imatrix") as caught:
            here.choose(needs=EngineNeeds(extra=("--foo",)))
        assert "tools build" in caught.value.todo


class TestAsked:
    def test_binaries(self, here: Here) -> None:
        choice = here.choose("binaries")
        assert (choice.name, choice.notice) == ("binaries", None)
        here.toolchain = None
        with pytest.raises(ToolchainError, match=r"No llama\.cpp binaries"):
            here.choose("binaries")

    def test_embedded(self, here: Here) -> None:
        choice = here.choose("embedded", llama_cpp=Path("/for-conversion"))
        assert choice.name == "embedded"
        assert said(choice) == "detail: Engine: embedded, llama-cpp-python 0.3.36 (its own libraries)"
        assert here.looked == 0

    def test_embedded_cannot_take_options_for_llama_imatrix(self, here: Here) -> None:
        with pytest.raises(UsageError, match="does not know --foo") as caught:
            here.choose("embedded", EngineNeeds(extra=("--foo",)))
        assert "--engine binaries" in caught.value.todo

    @pytest.mark.parametrize("bindings", [MISSING, BROKEN])
    def test_embedded_that_cannot_be_used_says_why(self, here: Here, bindings: UnusableBindings) -> None:
        here.bindings = bindings
        with pytest.raises(ToolchainError) as caught:
            here.choose("embedded")
        assert caught.value is bindings


class TestNoGpu:
    def test_the_remedy_fits_the_engine(self, here: Here) -> None:
        assert 'CMAKE_ARGS="-DGGML_CUDA=on" pip install' in here.choose().no_gpu()
        assert "tools build --backend cuda" in here.choose("binaries").no_gpu()


class TestHardware:
    def test_device_files_show_whether_a_gpu_can_be_there(self, tmp_path: Path) -> None:
        (tmp_path / "nvidiactl").touch()
        assert not may_have_gpu(tmp_path, "Linux")
        (tmp_path / "dri").mkdir()
        (tmp_path / "dri" / "renderD128").touch()
        assert may_have_gpu(tmp_path, "Linux")
        assert not may_have_gpu(tmp_path / "none", "Linux")
        assert may_have_gpu(tmp_path / "none", "Darwin")

    @pytest.mark.parametrize(
        ("features", "likes"),
        [("CPU : AVX512 = 1 | AVX512_BF16 = 1 | REPACK = 1", True), ("CPU : AVX512 = 1 | AVX512_VNNI = 1", False), ("", False)],
    )
    def test_bf16(self, features: str, likes: bool) -> None:
        assert likes_bf16(features) is likes


def said(choice: EngineChoice) -> str:
    assert choice.notice is not None
    return f"{choice.notice.level}: {choice.notice.text}"
