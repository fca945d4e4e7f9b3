"""The main job on every kind of source: a hub id through a real local hub, a Hugging Face directory through the converter."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest

from imatrix_runner.context.source_hashes import stamped_fingerprint
from imatrix_runner.extras import CONVERT
from imatrix_runner.models.gguf_file import read_header
from support.command_line import Ran, RunCommand
from support.hub_server import HubServer
from support.hub_trouble import Trouble
from support.in_process import CommandLine
from support.tiny_models import sample_text, write_hf_directory, write_llama_gguf

TOKEN = "hf_" + "0123456789" * 3
REPO = "tiny-org/Tiny-Llama"
GATED = "tiny-org/Gated-Llama"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    model = write_llama_gguf(tmp_path / "Tiny-Llama-BF16.gguf", layers=1)
    with HubServer(token=TOKEN) as server:
        server.add(REPO, {"README.md": b"tiny", "Tiny-Llama-BF16.gguf": model, "Tiny-Llama-Q4_K_M.gguf": b"GGUF"})
        server.add(GATED, {"Gated-Llama-BF16.gguf": model}, gated=True)
        yield server


@pytest.fixture
def fetch(hub: HubServer, runner: RunCommand, tmp_path: Path) -> RunCommand:
    """Run a command against the local hub, with a cache of its own and no token."""
    (tmp_path / "text.txt").write_text(sample_text(20_000), encoding="utf-8")

    def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Ran:
        surroundings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **(env or {})}
        return runner(*arguments, "-f", "text.txt", "--levels", "Q4_K_M", env=surroundings)

    return run


def test_a_model_is_downloaded_by_id_and_quantised(fetch: RunCommand, hub: HubServer, tmp_path: Path) -> None:
    ran = fetch("run", REPO, "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    assert document["model"]["name"] == "Tiny-Llama"
    assert document["model"]["source"]["repo"] == REPO
    assert document["model"]["source"]["commit"] == hub.find(REPO).commit  # type: ignore[union-attr]
    written = tmp_path / "work" / "Tiny-Llama" / "Tiny-Llama-Q4_K_M.gguf"
    assert read_header(written).text("general.architecture") == "llama"
    assert hub.downloads() == ["Tiny-Llama-BF16.gguf"]


def test_the_second_time_downloads_and_makes_nothing(fetch: RunCommand, hub: HubServer) -> None:
    assert fetch("run", REPO).code == 0
    again = fetch("run", REPO, "--json")
    assert [level["status"] for level in again.document["levels"]] == ["skipped"]
    assert len(hub.downloads()) == 1


def test_a_cached_file_that_was_damaged_since_is_noticed(fetch: RunCommand, tmp_path: Path) -> None:
    """The hub's cache names a large file after its SHA-256."""
    assert fetch("run", REPO).code == 0
    (blob,) = [path for path in (tmp_path / "hf").rglob("blobs/*") if path.stat().st_size > 100_000]
    with blob.open("r+b") as handle:
        handle.seek(blob.stat().st_size // 2)
        handle.write(b"damaged")
    ran = fetch("run", REPO)
    assert ran.code == 6, ran.err
    assert "in the hub's cache is damaged" in ran.err
    assert str(blob) in ran.err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (GATED, "licence"),
        ("tiny-org/not-there", "not-there"),
        (f"{REPO}@no-such-branch", "no-such-branch"),
        (f"{REPO}:Tiny-Lama-BF16.gguf", "Tiny-Llama-BF16.gguf"),
    ],
)
def test_what_the_hub_refuses_is_exit_4(fetch: RunCommand, model: str, said: str) -> None:
    ran = fetch("run", model)
    assert ran.code == 4, ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("\n  Why: ") == ran.err.count("\n  Do:  ") == 1


def test_a_connection_that_is_always_cut_is_exit_4_and_the_next_try_goes_on(
    fetch: RunCommand, hub: HubServer, tmp_path: Path
) -> None:
    hub.trouble = Trouble(cut_after=1000)
    ran = fetch("run", REPO)
    assert ran.code == 4, ran.err
    assert not list((tmp_path / "work").rglob("*.gguf"))
    hub.trouble = Trouble()
    assert fetch("run", REPO).code == 0


def test_no_hub_at_all_is_exit_4(fetch: RunCommand) -> None:
    ran = fetch("run", REPO, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert ran.code == 4, ran.err


def test_the_token_is_used_and_never_told(fetch: RunCommand, tmp_path: Path) -> None:
    ran = fetch("run", GATED, "-v", env={"HF_TOKEN": TOKEN})
    assert ran.code == 0, ran.err
    told = ran.out + ran.err + "".join(path.read_text("utf-8", "replace") for path in (tmp_path / "work").rglob("*.log"))
    assert TOKEN not in told
    assert TOKEN not in (tmp_path / "work" / "Gated-Llama" / "journal.json").read_text()


def test_a_dry_run_of_a_hub_id_says_why_it_cannot(fetch: RunCommand, hub: HubServer) -> None:
    ran = fetch("run", REPO, "--dry-run")
    assert ran.code == 2
    assert "before it is downloaded" in ran.err
    assert hub.downloads() == []


@pytest.mark.convert
@pytest.mark.skipif(bool(CONVERT.missing()), reason="the convert extra is not installed")
def test_a_hugging_face_directory_becomes_q4_k_m(runner: RunCommand, tmp_path: Path) -> None:
    """One in the hub's cache, whose own name is a commit."""
    directory = tmp_path / "models--org--tiny-hf" / "snapshots" / ("c0ffee" * 6 + "c0de")
    write_hf_directory(directory)
    (tmp_path / "text.txt").write_text(sample_text(20_000), encoding="utf-8")
    arguments = ("run", directory, "-f", "text.txt", "--levels", "Q4_K_M", "--json")
    ran = runner(*arguments)
    assert ran.code == 0, ran.err
    workspace = tmp_path / "work" / "tiny-hf"
    (converted,) = [path for path in workspace.glob("*.gguf") if path.stem.endswith(("-BF16", "-F16", "-F32"))]
    level = read_header(workspace / "tiny-hf-Q4_K_M.gguf")
    assert (level.text("general.architecture"), level.text("general.name")) == ("llama", "tiny-hf")
    before = converted.stat().st_mtime_ns
    again = runner(*arguments)
    assert [level["status"] for level in again.document["levels"]] == ["skipped"]
    assert converted.stat().st_mtime_ns == before
    journal = workspace / "journal.json"
    document = json.loads(journal.read_text(encoding="utf-8"))
    inputs = document["steps"]["convert bf16"]["inputs"]
    now, inputs["model directory"] = inputs["model directory"], stamped_fingerprint(directory)  # as earlier versions had it
    journal.write_text(json.dumps(document), encoding="utf-8")
    assert [level["status"] for level in runner(*arguments).document["levels"]] == ["skipped"]
    assert json.loads(journal.read_text(encoding="utf-8"))["steps"]["convert bf16"]["inputs"]["model directory"] == now
    weights = directory / "model.safetensors"
    at, content = weights.stat(), bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(at.st_atime_ns, at.st_mtime_ns))  # the same size and time, another weight
    assert "before it is converted" in runner(*arguments, "--dry-run").err


@pytest.mark.convert
@pytest.mark.skipif(bool(CONVERT.missing()), reason="the convert extra is not installed")
def test_a_directory_with_code_is_refused_unless_trusted(runner: RunCommand, tmp_path: Path) -> None:
    directory = tmp_path / "tiny-hf"
    write_hf_directory(directory)
    (directory / "modeling_evil.py").write_text("raise SystemExit('executed')")
    ran = runner("run", directory, "--levels", "Q4_K_M")
    assert ran.code == 6, ran.err
    assert "--trust-remote-code" in ran.err


def publish_in_fp8(directory: Path) -> Path:
    """A checkpoint whose ``up_proj`` are 8-bit floats with a scale each, as DeepSeek publishes its models."""
    write_hf_directory(directory, layers=1)
    raw = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    tensors, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    tensors.pop("__metadata__")
    blobs: dict[str, tuple[str, list[int], bytes]] = {}
    for name, entry in tensors.items():
        start, end = entry["data_offsets"]
        if name.endswith("up_proj.weight"):
            blobs[name] = ("F8_E4M3", entry["shape"], bytes(range(1, 101)) * (prod(entry["shape"]) // 100 + 1))
            blobs[name] = (*blobs[name][:2], blobs[name][2][: prod(entry["shape"])])
            blobs[f"{name}_scale_inv"] = ("F32", [1, 1], struct.pack("<f", 0.01))
        else:
            blobs[name] = (entry["dtype"], entry["shape"], data[start:end])
    header, offset = {}, 0
    for name, (dtype, shape, blob) in blobs.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
    encoded = json.dumps(header).encode()
    written = struct.pack("<Q", len(encoded)) + encoded + b"".join(blob for _, _, blob in blobs.values())
    (directory / "model.safetensors").write_bytes(written)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    # One block as large as the tensor: the tiny model's rows are shorter than the usual 128 x 128.
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [512, 256]}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_a_quantised_checkpoint_is_refused_before_it_is_converted(cli: CommandLine, tmp_path: Path) -> None:
    directory = publish_in_fp8(tmp_path / "tiny-fp8")
    for further in ((), ("--dry-run",)):
        ran = cli("run", directory, "--levels", "Q8_0", *further)
        assert ran.code == 6, ran.err
        assert "stored as fp8" in ran.err
        assert "--allow-requantize" in ran.err
    assert not list((tmp_path / "work").rglob("*.gguf"))


@pytest.mark.convert
@pytest.mark.skipif(bool(CONVERT.missing()), reason="the convert extra is not installed")
def test_a_quantised_checkpoint_that_is_allowed_is_named_wherever_its_levels_are(cli: CommandLine, tmp_path: Path) -> None:
    directory = publish_in_fp8(tmp_path / "tiny-fp8")
    ran = cli("run", directory, "--levels", "Q8_0", "--imatrix", "none", "--allow-requantize", "--json")
    assert ran.code == 0, ran.err
    assert "published in fp8" in ran.err
    assert ran.document["model"]["source"]["dequantised"] == "fp8"
    workspace = tmp_path / "work" / "tiny-fp8"
    assert json.loads((workspace / "report.json").read_text(encoding="utf-8"))["model"]["dequantised"] == "fp8"
    assert "quantised form (fp8)" in (workspace / "report.md").read_text(encoding="utf-8")
    assert "fp8, dequantised before these files were made" in (workspace / "report.html").read_text(encoding="utf-8")
