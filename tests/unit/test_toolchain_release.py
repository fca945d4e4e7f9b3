"""Names of release archives, choosing among them, who hears the token, and what hardware tools say."""

from __future__ import annotations

import pytest

from imatrix_runner.errors import DownloadError
from imatrix_runner.toolchain.hardware import advice, backend_for, gpus, parse_nvidia, parse_rocm
from imatrix_runner.toolchain.release import Asset, Release, asset_name, choose, headers_for, parse_release

NAMES = (
    "cudart-llama-b7-bin-ubuntu-cuda-12.8-x64.tar.gz",
    "cudart-llama-bin-win-cuda-12.4-x64.zip",
    "llama-b7-bin-macos-arm64.tar.gz",
    "llama-b7-bin-ubuntu-arm64.tar.gz",
    "llama-b7-bin-ubuntu-cuda-13.4-x64.tar.gz",
    "llama-b7-bin-ubuntu-cuda-12.8-x64.tar.gz",
    "llama-b7-bin-ubuntu-rocm-10.0-x64.tar.gz",
    "llama-b7-bin-ubuntu-vulkan-x64.tar.gz",
    "llama-b7-bin-ubuntu-x64.tar.gz",
    "llama-b7-bin-win-cpu-x64.zip",
    "llama-b7-bin-win-cuda-12.4-x64.zip",
    "llama-b7-bin-win-cuda-13.4-x64.zip",
)
RELEASE = Release("b7", tuple(Asset(name, 1, f"http://x/{name}", "0" * 64) for name in NAMES))


@pytest.mark.parametrize(
    ("system", "machine", "backend", "expected"),
    [
        ("Linux", "x86_64", "cpu", ["llama-b7-bin-ubuntu-x64.tar.gz"]),
        ("Linux", "aarch64", "cpu", ["llama-b7-bin-ubuntu-arm64.tar.gz"]),
        ("Linux", "x86_64", "vulkan", ["llama-b7-bin-ubuntu-vulkan-x64.tar.gz"]),
        ("Linux", "x86_64", "hip", ["llama-b7-bin-ubuntu-rocm-10.0-x64.tar.gz"]),
        ("Darwin", "arm64", "metal", ["llama-b7-bin-macos-arm64.tar.gz"]),
        ("Darwin", "arm64", "cpu", ["llama-b7-bin-macos-arm64.tar.gz"]),
        ("Windows", "AMD64", "cpu", ["llama-b7-bin-win-cpu-x64.zip"]),
        (
            *("Linux", "x86_64", "cuda"),
            ["llama-b7-bin-ubuntu-cuda-12.8-x64.tar.gz", "cudart-llama-b7-bin-ubuntu-cuda-12.8-x64.tar.gz"],
        ),
        ("Windows", "AMD64", "cuda", ["llama-b7-bin-win-cuda-12.4-x64.zip", "cudart-llama-bin-win-cuda-12.4-x64.zip"]),
    ],
)
def test_the_archives_for_a_platform(system: str, machine: str, backend: str, expected: list[str]) -> None:
    assert [asset.name for asset in choose(RELEASE, asset_name("b7", system, machine, backend))] == expected


@pytest.mark.parametrize(
    ("system", "machine", "backend"), [("Linux", "riscv64", "cpu"), ("FreeBSD", "amd64", "cpu"), ("Darwin", "x86_64", "metal")]
)
def test_platforms_without_an_archive(system: str, machine: str, backend: str) -> None:
    with pytest.raises(DownloadError) as caught:
        asset_name("b7", system, machine, backend)
    assert "tools build" in caught.value.todo
    assert caught.value.exit_code == 4


def test_a_release_without_the_archive_lists_what_it_has() -> None:
    with pytest.raises(DownloadError) as caught:
        choose(RELEASE, asset_name("b7", "Linux", "s390x", "cpu"))
    assert "llama-b7-bin-ubuntu-x64.tar.gz" in caught.value.why


def test_what_cannot_be_verified_is_refused() -> None:
    data = {"tag_name": "b7", "assets": [{"name": NAMES[8], "size": 1, "browser_download_url": "http://x", "digest": None}]}
    with pytest.raises(DownloadError, match="no SHA-256"):
        choose(parse_release(data, "u"), asset_name("b7", "Linux", "x86_64", "cpu"))
    data["assets"][0]["digest"] = "md5:" + "0" * 32  # type: ignore[index]
    assert parse_release(data, "u").assets[0].sha256 == ""
    data["assets"][0]["digest"] = "sha256:" + "AB" * 32  # type: ignore[index]
    assert parse_release(data, "u").assets[0].sha256 == "ab" * 32


@pytest.mark.parametrize("data", [[], {"message": "Not Found"}, {"tag_name": 7, "assets": []}])
def test_something_else_than_a_release(data: object) -> None:
    with pytest.raises(DownloadError, match="could not be understood"):
        parse_release(data, "u")


def test_the_token_goes_to_githubs_api_and_nowhere_else() -> None:
    env = {"GITHUB_TOKEN": "secret"}
    assert headers_for("https://api.github.com/repos/x", env)["Authorization"] == "Bearer secret"
    for url in (
        "http://api.github.com/repos/x",
        "https://github.com/x",
        "https://api.github.com.evil.example/x",
        "https://api.github.com:8443/x",
        "https://user@evil.example/api.github.com",
        "http://127.0.0.1:8000/releases/latest",
    ):
        assert "secret" not in str(headers_for(url, env))
    assert "Authorization" not in headers_for("https://api.github.com/x", {})


# Hardware

ROCMINFO = """
Agent 1
  Name:                    AMD EPYC 9454
  Marketing Name:          AMD EPYC 9454 48-Core Processor
  Device Type:             CPU
Agent 2
  Name:                    gfx942
  Marketing Name:          AMD Instinct MI300X
  Device Type:             GPU
"""


def test_gpus_out_of_what_their_tools_say() -> None:
    assert parse_nvidia("NVIDIA H200, 143771\nTesla T4, 15360\n") == ["NVIDIA H200 (143771 MiB)", "NVIDIA Tesla T4 (15360 MiB)"]
    assert parse_nvidia("No devices were found\n") == []
    assert parse_rocm(ROCMINFO) == ["AMD Instinct MI300X"]
    assert parse_rocm("") == []


def test_an_idle_gpu_is_worth_a_word() -> None:
    told = advice(("NVIDIA H200 (143771 MiB)",), ("cpu",))
    assert told is not None
    assert told.endswith("imatrix-runner tools build --backend cuda")
    assert advice((), ("cpu",)) is None
    assert advice(("NVIDIA H200",), ("cpu", "cuda")) is None
    assert [backend_for(gpu) for gpu in ("AMD Instinct", "Apple M3 (Metal)", "NVIDIA T4")] == ["hip", "metal", "cuda"]


def test_absent_tools_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert gpus() == ()
