"""``batch``: lists of tiny models through a loopback hub, on a bounded disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.app.batch import EntryReader, batch_status, run_batch
from imatrix_runner.app.batch_work import BatchWorker
from imatrix_runner.batch.batch_folder import BatchFolder, append_addition, hold_batch
from imatrix_runner.batch.overview import BatchView
from imatrix_runner.cli.commands.batch_entries import known_options, request_of
from imatrix_runner.context.context import Context
from imatrix_runner.context.requests import BatchRequest, EnvironmentRequest
from imatrix_runner.events import ignore
from support.batches import check_repository, watched, weights_in, write_list
from support.hub_server import HubServer, Request, be_quick_and_anonymous
from support.in_process import CommandLine
from support.publishing import TOKEN, published
from support.tiny_architectures import write_architecture
from support.tiny_models import write_hf_directory, write_llama_gguf

QUICK = {"imatrix": "none", "threads": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of several architectures, about 2 MiB each."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: write_architecture(name, folder / f"{name}-BF16.gguf", dtype="BF16") for name in ("qwen3", "mamba")}
    return {**made, "llama": write_llama_gguf(folder / "llama-BF16.gguf", fluent=True)}


@pytest.fixture
def hub(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    be_quick_and_anonymous(monkeypatch, tmp_path)
    with HubServer(token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        for name, path in models.items():
            server.add(f"org/{name}", {path.name: path}, card={"license": "mit"})
        yield server


def by_name(document: dict[str, Any]) -> dict[str, Any]:
    return {model["model"]: model for model in document["batch"]["models"]}


def test_a_night_leaves_repositories_and_an_empty_disk(
    tmp_path: Path, models: dict[str, Path], hub: HubServer, cli: CommandLine
) -> None:
    """One model vanishes between the check and the fetch, one was never there; the others do not notice."""
    hub.add("org/vanishing", {"vanishing-BF16.gguf": models["qwen3"]})
    hub.trouble.gone.add("vanishing-BF16.gguf")
    names = ["org/vanishing", "org/nothing", "org/qwen3", {"model": "org/llama", "priority": 1}]
    file = write_list(tmp_path / "models.yaml", names, levels=["Q8_0", "Q4_0", "Q4_K_M"], publish="me", **QUICK)
    with watched(file) as disk:
        done = cli("batch", file, "--keep", "nothing", "--json")
    assert done.code == 100
    found = by_name(done.document)
    assert [name for name, model in found.items() if model["state"] == "done"] == ["org/llama", "org/qwen3"]
    for name, what in (("org/vanishing", "A file of org/vanishing is missing"), ("org/nothing", "org/nothing")):
        failure = found[name]["failure"]
        assert what in failure["what"]
        assert failure["why"]
        assert failure["do"]
    for name in ("qwen3", "llama"):
        check_repository(hub, name, ("Q8_0", "Q4_0", "Q4_K_M"))
    assert weights_in(tmp_path / "work") == 0
    assert weights_in(tmp_path / "models.yaml.batch") == 0
    sizes = {name: [len(published(hub, f"me/{name}-GGUF").content(f"{name}-{level}.gguf")) for level in ("Q8_0", "Q4_0")]
             for name in ("qwen3", "llama")}  # fmt: skip
    bound = max(models[name].stat().st_size + sum(sizes[name]) for name in sizes)
    assert disk.most <= bound, disk.files
    page = (tmp_path / "models.yaml.batch" / "batch.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in page
    assert page.count("Upload") == 0
    assert "A file of org/vanishing is missing" in page
    # The next command tries those that failed, and leaves the others alone.
    hub.trouble.gone.clear()
    asked = len(hub.requests)
    again = cli("batch", file, "--keep", "nothing", "--json")
    assert by_name(again.document)["org/vanishing"]["state"] == "done"
    assert not any("org/qwen3" in request.path for request in hub.requests[asked:])
    status = cli("batch", "status", file)
    assert "4 models: 3 done, 1 failed" in status.out
    assert "org/nothing" in status.out


def test_what_the_user_put_there_stays(tmp_path: Path, models: dict[str, Path], hub: HubServer, cli: CommandLine) -> None:
    """A local source, a level that an earlier run made, and a model in the hub's cache."""
    mine = tmp_path / "llama-BF16.gguf"
    mine.write_bytes(models["llama"].read_bytes())
    assert cli("run", mine, "--imatrix", "none", "-t", "1", "--levels", "Q8_0", "-q").code == 0
    assert cli("run", "org/mamba", "--imatrix", "none", "-t", "1", "--levels", "Q8_0", "-q").code == 0
    cached = weights_in(tmp_path / "hub-cache")
    file = write_list(tmp_path / "m.yaml", [str(mine), "org/mamba"], levels="Q8_0,Q4_0", publish="me", **QUICK)
    done = cli("batch", "run", file, "--keep", "nothing", "--json")
    assert done.code == 0, done.err
    assert mine.read_bytes() == models["llama"].read_bytes()
    assert sorted(path.name for path in (tmp_path / "work").rglob("*.gguf")) == ["llama-Q8_0.gguf", "mamba-Q8_0.gguf"]
    assert weights_in(tmp_path / "hub-cache") == cached
    check_repository(hub, "llama", ("Q8_0", "Q4_0"))
    check_repository(hub, "mamba", ("Q8_0", "Q4_0"))


def test_the_check_finds_what_is_wrong_and_writes_nothing(
    tmp_path: Path, models: dict[str, Path], hub: HubServer, cli: CommandLine
) -> None:
    hub.add("org/secret", {"secret-BF16.gguf": b"x" * 100}, gated="manual", accepted=False)
    hub.add("org/strange", {"config.json": b'{"architectures": ["NoSuchForCausalLM"]}', "model.safetensors": b"x" * 100})
    hub.add("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    hub.add("me/taken-GGUF", {"README.md": b"x"})
    entries: list[object] = ["org/llama", "org/secret", "org/strange", "org/adapter", "org/none", "no/such/path.gguf"]
    entries += [{"model": "org/qwen3", "levels": "Q4_0", "rounding": "wild"}, {"model": "org/mamba", "calibration": "none.txt"}]
    entries += [{"model": "org/other", "levels": "Q4_0,Q9_9"}, {"model": "org/named", "name-template": "{model}"}]
    hub.add("org/other", {"other-BF16.gguf": models["llama"]})
    hub.add("org/named", {"named-BF16.gguf": models["llama"]})
    file = write_list(tmp_path / "m.yaml", entries, levels=["Q4_0"], publish="me")
    planned = cli("batch", file, "--dry-run", "--json")
    assert planned.code == 100
    assert planned.document["batch"] is None
    found = {model["model"]: model for model in planned.document["plan"]["models"]}
    fine = found["org/llama"]
    assert fine["problem"] is None
    assert (fine["licence"], fine["publish"], fine["levels"][0]["level"]) == ("mit", "me/llama-GGUF", "Q4_0")
    said = {name: model["problem"]["what"] for name, model in found.items() if model["problem"]}
    assert "is gated" in said["org/secret"]
    assert "cannot be converted" in said["org/strange"]
    assert "adapter" in said["org/adapter"]
    assert "'--rounding'" in said["org/qwen3"]
    assert "none.txt does not exist" in said["org/mamba"]
    assert "Unknown level 'Q9_9'" in said["org/other"]
    assert "org/named" in said
    assert len(said) == 9
    assert all(model["problem"]["why"] and model["problem"]["do"] for model in found.values() if model["problem"])
    assert not (tmp_path / "m.yaml.batch").exists()
    assert not (tmp_path / "work").exists()
    assert hub.downloads() == []
    table = cli("batch", file, "--dry-run")
    assert "cannot be made" in table.out
    assert "Disk at the peak: about" in table.out


def test_a_list_with_a_mistake_is_refused_before_anything(tmp_path: Path, cli: CommandLine) -> None:
    file = write_list(tmp_path / "m.yaml", [{"model": "a/b", "levles": "Q4_0"}])
    refused = cli("batch", file)
    assert refused.code == 2
    assert "Did you mean 'levels'?" in refused.err
    assert len(refused.err.strip().splitlines()) == 3
    file.write_text("- {model: a/b, trust-remote-code: true}\n")
    assert cli("batch", file).code == 2
    assert not (tmp_path / "m.yaml.batch").exists()
    assert cli("batch", tmp_path / "none.yaml").code == 2


def test_two_batches_on_one_list_are_refused(tmp_path: Path, hub: HubServer, cli: CommandLine) -> None:
    file = write_list(tmp_path / "m.yaml", ["org/llama"], levels="Q4_0", **QUICK)
    with hold_batch(BatchFolder.of(file), "the first"):
        refused = cli("batch", file)
        assert refused.code == 7
        assert "This batch is running already" in refused.err


def test_models_are_added_while_it_runs(tmp_path: Path, models: dict[str, Path], hub: HubServer, cli: CommandLine) -> None:
    """An addition is taken up; one that is not understood is reported and skipped."""
    file = write_list(tmp_path / "m.yaml", ["org/llama"], levels="Q4_0", **QUICK)
    added = threading.Event()
    status: list[BatchView] = []

    def add_once(request: Request, done: bool) -> None:
        if "/resolve/" in request.path and not done and not added.is_set():
            added.set()
            status.append(batch_status(file, EntryReader(known_options(), request_of)))
            append_addition(BatchFolder.of(file), [{"model": "org/qwen3", "levels": "Q8_0"}, {"model": "x", "nonsense": 1}])

    hub.on_request = add_once
    done = cli("batch", file, "--json", "--keep", "levels")
    assert done.code == 0, done.err
    assert [*by_name(done.document)] == ["org/llama", "org/qwen3"]
    (seen,) = status
    assert (seen.state, seen.models[0].state, seen.models[0].stages[0].stage) == ("running", "running", "download")
    assert "An addition is skipped: Unknown key 'nonsense'" in done.err
    assert len(done.document["batch"]["faults"]) == 1
    assert sorted(path.name for path in tmp_path.rglob("*.gguf")) == ["llama-Q4_0.gguf", "qwen3-Q8_0.gguf"]
    # By the command, whether it runs or not: checked as the list is.
    twice = cli("batch", "add", file, "org/llama")
    assert (twice.code, "is there twice" in twice.err) == (2, True)
    wrong = cli("batch", "add", file, "org/mamba", "--set", "levles=Q4_0")
    assert (wrong.code, "Did you mean 'levels'?" in wrong.err) == (2, True)
    assert cli("batch", "add", file, "org/mamba", "--set", "threads=1").code == 0
    again = cli("batch", file, "--json", "--keep", "levels")
    assert by_name(again.document)["org/mamba"]["state"] == "done"


def test_a_model_that_does_not_fit_is_left_out(
    tmp_path: Path, models: dict[str, Path], hub: HubServer, cli: CommandLine
) -> None:
    big = write_llama_gguf(tmp_path / "big.gguf", hidden=512, fluent=True)
    hub.add("org/big", {"big-BF16.gguf": big})
    room = models["llama"].stat().st_size * 2
    file = write_list(tmp_path / "m.yaml", ["org/big", "org/llama"], levels="Q4_0", **QUICK)
    done = cli("batch", file, "--json", "--keep", "levels", "--max-disk", f"{room}B")
    assert done.code == 100
    found = by_name(done.document)
    assert found["org/llama"]["state"] == "done"
    assert found["org/big"]["failure"]["kind"] == "no-space"
    assert "does not fit" in found["org/big"]["failure"]["what"]
    assert done.document["plan"]["do_not_fit"] == ["org/big"]


def test_two_lanes_compute_two_models_at_a_time_with_the_same_files(tmp_path: Path, models: dict[str, Path]) -> None:
    sources = [*models.values(), write_llama_gguf(tmp_path / "other-BF16.gguf", fluent=True, seed=5)]
    made: dict[int, dict[str, bytes]] = {}
    at_once: dict[int, int] = {}
    for lanes in (1, 2):
        (folder := tmp_path / str(lanes)).mkdir()
        file = write_list(folder / "m.yaml", [str(path) for path in sources], levels="Q4_0,Q8_0", **QUICK)
        request = BatchRequest(file, EnvironmentRequest(folder / "work"), lanes=lanes)
        seen: list[tuple[int | None, ...]] = []

        def look(view: BatchView, _folder: BatchFolder, seen: list[tuple[int | None, ...]] = seen) -> None:
            computing = [stage for model in view.models for stage in model.stages if stage.stage in ("prepare", "make")]
            seen.append(tuple(stage.compute_lane for stage in computing))

        result = run_batch(request, EntryReader(known_options(), request_of), Context(ignore), on_view=look)
        assert not result.failed
        levels = sorted((folder / "work").rglob("*.gguf"))
        made[lanes] = {path.name: path.read_bytes() for path in levels}
        at_once[lanes] = max(map(len, seen))
        assert all(len({*numbers}) == len(numbers) for numbers in seen)
        assert {number for numbers in seen for number in numbers} == ({None} if lanes == 1 else {0, 1})
    assert at_once == {1: 1, 2: 2}
    assert len(made[1]) == 8
    assert made[1] == made[2]


def test_a_level_that_fails_does_not_take_the_others(tmp_path: Path, hub: HubServer, cli: CommandLine) -> None:
    file = write_list(tmp_path / "m.yaml", ["org/llama"], levels="Q4_0,IQ2_XXS", publish="me", **QUICK)
    done = cli("batch", file, "--json", "--keep", "nothing")
    assert done.code == 100
    model = by_name(done.document)["org/llama"]
    assert {level["name"]: level["state"] for level in model["levels"]} == {"Q4_0": "published"}
    assert [*model["failed_levels"]] == ["IQ2_XXS"]
    check_repository(hub, "llama", ("Q4_0",))


def test_what_the_network_broke_is_tried_again(
    tmp_path: Path, hub: HubServer, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage that outlasts the tries of one upload; the other model is finished meanwhile."""
    monkeypatch.setattr("imatrix_runner.app.batch_work.RETRY_SECONDS", (0.01,))
    file = write_list(tmp_path / "m.yaml", [{"model": "org/llama", "publish": "me"}, "org/qwen3"], levels="Q4_0", **QUICK)
    tried = BatchWorker._try_again

    def break_down(request: Request, done: bool) -> None:
        if request.path == "/api/repos/create":
            hub.trouble.status, hub.trouble.status_for = 503, request.path

    def heal(worker: BatchWorker) -> bool:
        hub.on_request, hub.trouble.status = lambda _request, _done: None, 0
        return tried(worker)

    hub.on_request = break_down
    monkeypatch.setattr(BatchWorker, "_try_again", heal)
    done = cli("batch", file, "--json")
    assert done.code == 0, done.err
    assert "org/llama will be tried again" in done.err
    assert by_name(done.document)["org/llama"]["state"] == "done"
    check_repository(hub, "llama", ("Q4_0",))


class _Inbox(BaseHTTPRequestHandler):
    messages: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.messages.append(json.loads(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Tests read ``messages``."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of apprise's own imports
def test_ends_and_failures_are_notified(tmp_path: Path, hub: HubServer, cli: CommandLine) -> None:
    pytest.importorskip("apprise")
    inbox: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Inbox", (_Inbox,), {"messages": inbox}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    port = server.server_address[1]
    file = write_list(tmp_path / "m.yaml", ["org/llama", "org/none"], levels="Q4_0", **QUICK)
    addresses = (
        "--notify",
        f"json://user:secret-password@127.0.0.1:{port}/",
        "--notify",
        "json://user:other-password@127.0.0.1:1/",
    )
    done = cli("batch", file, *addresses)
    server.shutdown()
    server.server_close()
    assert done.code == 100
    assert [message["title"] for message in inbox] == ["org/none: cannot be made", "org/llama: done", "Batch finished"]
    assert [message["type"] for message in inbox] == ["failure", "success", "failure"]
    assert "1 of 2 models are done" in inbox[-1]["message"]
    assert "Warning: The notification to json://… could not be sent" in done.err
    written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file() and path != file)
    for secret in ("secret-password", "other-password"):
        assert secret not in done.err + done.out
        assert secret not in written
    assert cli("batch", file, "--notify", "nothing-known://x").code == 2


def test_a_changed_entry_is_worked_on_again(tmp_path: Path, models: dict[str, Path], hub: HubServer, cli: CommandLine) -> None:
    """What is there stays, what is new is made; an unchanged list is done in an instant."""
    file = write_list(tmp_path / "m.yaml", [str(models["llama"])], levels="Q4_0", **QUICK)
    assert cli("batch", file, "-q").code == 0
    level = tmp_path / "work" / "llama" / "llama-Q4_0.gguf"
    before = level.stat().st_mtime_ns
    again = cli("batch", file)
    assert again.code == 0
    assert "Model llama" not in again.err
    write_list(file, [str(models["llama"])], levels="Q4_0,Q8_0", **QUICK)
    changed = cli("batch", file, "--json").document
    assert [level["state"] for level in changed["batch"]["models"][0]["levels"]] == ["made", "made"]
    assert level.stat().st_mtime_ns == before


@pytest.mark.convert
def test_the_original_goes_once_it_is_converted(tmp_path: Path, hub: HubServer, cli: CommandLine) -> None:
    """It is not fetched again when the batch continues: the converted file is the source then."""
    pytest.importorskip("torch")
    hub.add_directory("org/tiny", write_hf_directory(tmp_path / "hf"))
    file = write_list(tmp_path / "m.yaml", [{"model": "org/tiny", "levels": "Q4_0", "publish": "me"}], **QUICK)
    seen: list[int] = []
    stopped = threading.Event()

    def refuse_uploads(request: Request, done: bool) -> None:
        if request.path == "/api/repos/create" and not done and not stopped.is_set():
            stopped.set()
            seen.append(weights_in(tmp_path / "m.yaml.batch"))
            hub.trouble.status, hub.trouble.status_for = 403, "POST /api/repos/create"

    hub.on_request = refuse_uploads
    failed = cli("batch", file, "--keep", "nothing", "--json")
    assert failed.code == 100
    assert by_name(failed.document)["org/tiny"]["failed_at"] == "Publish"
    assert seen == [0]
    work = tmp_path / "work" / "tiny"
    assert sorted(path.name for path in work.glob("*.gguf")) == ["tiny-BF16.gguf", "tiny-Q4_0.gguf"]
    hub.trouble.status = 0
    fetched = len(hub.downloads())
    done = cli("batch", file, "--keep", "nothing", "--json")
    assert done.code == 0, done.err
    assert len(hub.downloads()) == fetched
    assert [*work.glob("*.gguf")] == []
    check_repository(hub, "tiny", ("Q4_0",))
    report = json.loads((work / "report.json").read_text())
    assert report["model"]["repo"] == "org/tiny"
