"""``batch --watch``: models that appear on a loopback hub while a batch runs, filters, and a hub that fails or lies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.app.batch import EntryReader, batch_status, run_batch
from imatrix_runner.batch.batch_folder import BatchFolder
from imatrix_runner.batch.batch_journal import read_history
from imatrix_runner.batch.batch_list import MOST_ENTRIES
from imatrix_runner.batch.overview import BatchView
from imatrix_runner.cli.commands.batch_entries import known_options, request_of
from imatrix_runner.context.context import Context
from imatrix_runner.context.requests import BatchRequest, EnvironmentRequest, WatchRequest
from imatrix_runner.errors import InterruptedRunError
from imatrix_runner.events import Event, Notice
from imatrix_runner.models.hub import parse_place
from support.batches import surroundings, write_list
from support.command_line import started
from support.hub_server import HubServer, Request, be_quick_and_anonymous
from support.hub_uploads import Collection
from support.in_process import CommandLine
from support.publishing import TOKEN
from support.tiny_models import write_llama_gguf

QUICK = {"levels": "Q4_0", "imatrix": "none", "threads": 1}
SLUG = "org/best-of-0123456789abcdef01234567"
CONFIG = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
CHECKPOINT: dict[str, bytes | Path] = {"config.json": CONFIG, "model.safetensors": b"x" * 100}
SINCE = ("--watch-since", "2025-06-01")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("model") / "llama-BF16.gguf", fluent=True)


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    be_quick_and_anonymous(monkeypatch, tmp_path)
    with HubServer(token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        server.add("org/llama", {model.name: model})
        yield server


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    """A list of one local model."""
    return write_list(tmp_path / "m.yaml", [str(model)], **QUICK)


def appear(hub: HubServer, name: str, model: Path, **details: Any) -> None:
    hub.add(f"org/{name}", {f"{name}-BF16.gguf": model}, **details)


def added(file: Path) -> list[str]:
    lines = BatchFolder.of(file).additions
    return [json.loads(line)["model"] for line in lines.read_text().splitlines()] if lines.exists() else []


def watch(
    file: Path,
    *places: str,
    until: Callable[[BatchView], bool] = lambda _view: False,
    said: list[str] | None = None,
    **how: Any,
) -> tuple[list[str], BatchView]:
    """Run a batch that looks ten times a second, until something is on its page. What it ``said``, and its last page."""
    said = said if said is not None else []
    views: list[BatchView] = []

    def sink(event: Event) -> None:
        if isinstance(event, Notice):
            said.append(event.text)

    context = Context(sink)

    def show(view: BatchView, _folder: BatchFolder) -> None:
        views.append(view)
        if until(view):
            context.stop.request()

    asked = WatchRequest(tuple(map(parse_place, places)), **{"every": 0.1, **how})
    request = BatchRequest(file, EnvironmentRequest(file.parent / "work", command="again"), watch=asked)
    reader = EntryReader(known_options(), request_of)
    if asked.lasts is None:
        with pytest.raises(InterruptedRunError):
            run_batch(request, reader, context, on_view=show)
    else:
        run_batch(request, reader, context, on_view=show)
    return said, views[-1]


def is_done(name: str) -> Callable[[BatchView], bool]:
    return lambda view: any(each.model == name and each.state == "done" for each in view.models)


def test_what_appears_is_made_once(
    tmp_path: Path, model: Path, hub: HubServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner's model that appears after the first look; what was there is left alone. So it is by the next command. The clock
    goes backwards all the time, an hour whenever it is read."""
    monkeypatch.setattr("imatrix_runner.app.batch_work._SHOW_SECONDS", 0.0)
    monkeypatch.setattr("time.time", count(2_000_000_000.0, -3600.0).__next__)

    def publish(request: Request, done: bool) -> None:
        if request.path == "/api/models" and done:
            appear(hub, "new", model, created="2025-01-01T00:00:00.000Z")  # it was private until now

    hub.on_request = publish
    said: list[str] = []
    idle = "Everything is done. New models are looked for every 0.1 s until Ctrl-C."
    _, view = watch(file, "ORG", until=lambda view: is_done("org/new")(view) and idle in said, said=said)
    assert "Watching ORG for models that appear from now on; 1 are there." in said
    assert "New at ORG: org/new." in said
    assert not any("skipped" in line for line in said)
    assert added(file) == ["org/new"]
    (place,) = view.watches
    assert (place.place, place.listed, place.added, place.problem) == ("ORG", 2, 1, "")
    assert place.looked
    assert (tmp_path / "work" / "new" / "new-Q4_0.gguf").exists()
    # The list alone knows what was added: the journal may be lost.
    BatchFolder.of(file).journal.unlink()
    _, view = watch(file, "org", lasts=0.0)
    assert added(file) == ["org/new"]
    status = batch_status(file, EntryReader(known_options(), request_of))
    assert status.watches[0].ended
    assert status.watches[0].listed == 2
    page = BatchFolder.of(file).page
    assert not page.exists()  # the command line writes it


def test_it_goes_on_after_a_look_that_failed(model: Path, hub: HubServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is down for one look, with all its tries; the next finds what is new."""
    monkeypatch.setattr("imatrix_runner.app.batch_work._SHOW_SECONDS", 0.0)
    hub.trouble.status, hub.trouble.status_for, hub.trouble.status_times = 503, "GET /api/models", 3
    problems: set[str] = set()

    def until(view: BatchView) -> bool:
        problems.update(watch.problem for watch in view.watches)
        return is_done("org/llama")(view)

    said, view = watch(file, "trending", until=until)
    assert sum("Looking for new models at trending failed and will be tried again" in line for line in said) == 1
    assert any("HTTP status 503" in line for line in said)
    assert added(file) == ["org/llama"]
    assert view.watches[0].problem == ""


@pytest.mark.parametrize(
    ("trouble", "problem"),
    [
        ({"status": 429, "retry_after": 4000, "status_for": "GET /api/models"}, "limits the rate of requests"),
        ({"html": True}, "does not answer like a hub"),
        ({"answer": b'{"error": []}'}, "does not answer like a hub"),
        ({"answer": b"[" * 5000}, "does not answer like a hub"),
        ({"answer": b'[7, {"id": "../../x"}, {"id": "org/y", "siblings": 3, "tags": {}, "config": [], "gated": []}]'}, ""),
        ({"next_page": "http://127.0.0.1:9/api/models"}, "does not answer like a hub"),
        ({"offline": True}, "offline mode is on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_look_that_fails_ends_nothing(
    trouble: dict[str, Any], problem: str, hub: HubServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it move the moment from which models are new."""
    write_list(file, ["./none.gguf"], **QUICK)
    for name, value in trouble.items():
        setattr(hub.trouble, name, value)
    if "offline" in trouble:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, view = watch(file, "org", lasts=0.0)
    assert problem in view.watches[0].problem
    assert bool(problem) == bool(view.watches[0].problem)
    assert [each.state for each in view.models] == ["failed"]
    assert (read_history(BatchFolder.of(file).journal).watched == {}) == bool(problem)


def test_killed_while_it_makes_what_it_found(tmp_path: Path, model: Path, hub: HubServer, file: Path) -> None:
    """The same command goes on with it, and adds nothing twice."""
    appear(hub, "new", model, created="2026-02-01T00:00:00.000Z")
    words = ("batch", "m.yaml", "--watch", "org", "--watch-for", "0s", "--watch-since", "2026-01-15", "--json")
    with started(*words, cwd=tmp_path, env=surroundings(hub, tmp_path)) as running:

        def kill(request: Request, done: bool) -> bool:
            if "/resolve/" in request.path and not done:
                hub.on_request = lambda _request, _done: None
                os.kill(running.pid, signal.SIGKILL)
                return False
            return True

        hub.on_request = kill
        assert running.process.wait(100) == -signal.SIGKILL
    assert added(file) == ["org/new"]
    with started(*words, cwd=tmp_path, env=surroundings(hub, tmp_path)) as running:
        done = running.finish()
    assert done.code == 0, done.err
    assert added(file) == ["org/new"]
    assert [each["state"] for each in done.document["batch"]["models"]] == ["done", "done"]
    assert done.document["batch"]["watches"][0]["place"] == "org"


def dry(cli: CommandLine, file: Path, *words: str) -> dict[str, Any]:
    """What a look would find now; nothing is written or downloaded."""
    ran = cli("batch", file, "--dry-run", "--json", *words)
    assert not BatchFolder.of(file).root.exists()
    (look,) = ran.document["looks"]
    found: dict[str, Any] = look
    return found


def test_what_is_left_out_and_why(model: Path, hub: HubServer, file: Path, cli: CommandLine) -> None:
    quantised = {**CHECKPOINT, "config.json": CONFIG[:-1] + b', "quantization_config": {"quant_method": "gptq", "bits": 4}}'}
    fp8 = {**CHECKPOINT, "config.json": CONFIG[:-1] + b', "quantization_config": {"quant_method": "fp8"}}'}
    appear(hub, "secret", model, gated="manual", accepted=False)
    appear(hub, "granted", model, gated="auto", card={"license": "mit"})
    appear(hub, "copy", model, tags=("base_model:quantized:org/llama", "base_model:org/llama"))
    appear(hub, "again", model, tags=("base_model:org/llama",))
    appear(hub, "early", model, created="2025-01-01T00:00:00.000Z")
    appear(hub, "off", model, described={"disabled": True})
    appear(hub, "big", model, described={"gguf": {"total": 70_000_000_000, "architecture": "llama"}})
    hub.add("org/lora", {"adapter_config.json": b"{}"}, tags=("base_model:adapter:org/llama",))
    hub.add("org/plain-lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    hub.add("org/quants", {"quants-Q4_K_M.gguf": b"x"})
    hub.add("org/gptq", quantised)
    hub.add("org/fp8", fp8, tags=("base_model:finetune:org/llama",))
    hub.add("org/strange", {**CHECKPOINT, "config.json": b'{"architectures": ["NoSuchForCausalLM"]}'})
    hub.add("org/pickle", {"config.json": CONFIG, "pytorch_model.bin": b"x"})
    hub.add("datasets/org/texts", {"a.txt": b"x"})
    hub.add("other/elsewhere", {"elsewhere-BF16.gguf": model})
    look = dry(cli, file, "--watch", "org", *SINCE, "--watch-most", "9", "--watch-size", "8B")
    assert sorted(look["would_add"]) == ["org/granted", "org/llama"]
    expected = {
        "secret": "is gated",
        "copy": "quantised copy",
        "again": "made from another repository",
        "off": "disabled",
        "big": "it has 70 B weights, and at most 8 B",
        "lora": "adapter of another model",
        "plain-lora": "adapter",
        "quants": "no model in full precision",
        "gptq": "its weights are quantised (gptq)",
        "fp8": "its weights are quantised (fp8)",
        "strange": "onvert",
        "pickle": "PyTorch pickles",
    }
    assert {*look["left_out"]} == {f"org/{name}" for name in expected}
    for name, why in expected.items():
        assert why in look["left_out"][f"org/{name}"], name
    assert hub.downloads() == []
    licensed = dry(cli, file, "--watch", "org", *SINCE, "--watch-licence", "MIT,apache-2.0")
    assert licensed["would_add"] == ["org/granted"]
    assert licensed["left_out"]["org/llama"] == "its licence is not announced"
    named = dry(cli, file, "--watch", "org", *SINCE, "--watch-architecture", "nosuchforcausallm,qwen3")
    assert "onvert" in named["left_out"]["org/strange"]
    assert named["left_out"]["org/llama"] == "its architecture is not announced"
    table = cli("batch", file, "--dry-run", "--watch", "org", *SINCE)
    assert "would be added now" in table.out
    assert "org/quants is left out: " in table.out


@pytest.mark.convert
def test_checkpoints_that_can_be_converted(hub: HubServer, file: Path, cli: CommandLine) -> None:
    """By what the converter knows; one that was first published in FP8 is an original."""
    pytest.importorskip("torch")
    fp8 = {**CHECKPOINT, "config.json": CONFIG[:-1] + b', "quantization_config": {"quant_method": "fp8"}}'}
    hub.add("org/checkpoint", CHECKPOINT, created="2026-01-03T00:00:00.000Z", tags=("base_model:merge:org/llama",))
    hub.add("org/native", fp8, created="2026-01-02T00:00:00.000Z")
    hub.add("org/strange", {**CHECKPOINT, "config.json": b'{"architectures": ["NoSuchForCausalLM"]}'})
    look = dry(cli, file, "--watch", "org", *SINCE, "--watch-architecture", "LLAMA,NoSuchForCausalLM")
    assert look["would_add"] == ["org/checkpoint", "org/native"]
    assert "a NoSuchForCausalLM, which cannot be converted" in look["left_out"]["org/strange"]
    assert not any(request.path.startswith("/api/models/org/strange") for request in hub.requests)


def test_a_busy_listing_does_not_flood_the_list(model: Path, hub: HubServer, file: Path, cli: CommandLine) -> None:
    """The newest come first, in pages; what one look leaves is for the next. A list that is full takes no more."""
    for number in range(12):
        appear(hub, f"m{number:02d}", model, created=f"2026-03-{number + 1:02d}T00:00:00.000Z")
    hub.page_size = 5
    look = dry(cli, file, "--watch", "org", *SINCE, "--watch-most", "2")
    assert (look["listed"], look["would_add"], look["waiting"]) == (13, ["org/m11", "org/m10"], 11)
    folder = BatchFolder.of(file)
    folder.root.mkdir()
    folder.additions.write_text("\n".join('{"model": "x/m"}' for _ in range(MOST_ENTRIES)) + "\n")
    ran = cli("batch", file, "--dry-run", "--json", "--watch", "org", *SINCE)
    assert "No more models can be added" in ran.document["looks"][0]["problem"]
    refused = cli("batch", "add", file, "org/m00")
    assert (refused.code, "No more models can be added" in refused.err) == (2, True)


def test_collections_and_trends(
    tmp_path: Path, model: Path, hub: HubServer, file: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is in a collection is new, but for data sets and what is on the list; trends come by their rank."""
    appear(hub, "one", model, trending=1)
    appear(hub, "two", model, trending=5)
    items = ["org/two", "datasets/org/one", "org/llama", "org/none", "../etc"]
    hub.uploads.collections[SLUG] = Collection(SLUG, "Best of", items)
    write_list(file, ["org/llama@main", str(model)], **QUICK)
    look = dry(cli, file, "--watch", f"{hub.endpoint}/collections/{SLUG}")
    assert (look["listed"], look["would_add"], [*look["left_out"]]) == (3, ["org/two"], ["org/none"])
    assert dry(cli, file, "--watch", "trending")["would_add"] == ["org/two", "org/one"]
    missing = dry(cli, file, "--watch", SLUG[:-1] + "8")
    assert "There is no collection" in missing["problem"]
    # A model whose name is that of a local path is not taken for it, nor are two published to one place.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "two").mkdir(parents=True)
    hub.add("other/one", {"one-BF16.gguf": model}, trending=9)
    write_list(file, ["org/llama"], publish="me", **QUICK)
    look = dry(cli, file, "--watch", "trending")
    assert look["would_add"] == ["other/one"]
    assert "local path" in look["left_out"]["org/two"]
    assert "it would be published to me/one-GGUF, as other/one is" in look["left_out"]["org/one"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--watch", "org/model"), "it is a model"),
        (("--watch", "../x"), "it takes an organisation or user"),
        (("--watch", "org", "--watch-every", "59s"), "between 60 seconds and a year"),
        (("--watch", "org", "--watch-every", "often"), "not a length of time"),
        (("--watch", "org", "--watch-size", "many"), "not a number of weights"),
        (("--watch", "org", "--watch-since", "2026-02-30"), "it takes a day"),
        (("--watch", "org", "--watch-most", "0"), "0 is not in the range"),
        (("--watch", "org", "--offline"), "exclude each other"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_wrong_options_are_refused(words: tuple[str, ...], said: str, file: Path, cli: CommandLine) -> None:
    refused = cli("batch", file, *words)
    assert refused.code == 2
    assert said in refused.err


def test_options_at_their_bounds_and_without_effect(hub: HubServer, file: Path, cli: CommandLine) -> None:
    look = dry(cli, file, "--watch", "org", "--watch-every", "1min", "--watch-size", "0.5M")
    assert (look["first"], look["listed"], look["would_add"]) == (True, 1, [])
    idle = cli("batch", file, "--dry-run", "--watch-size", "8B")
    assert "--watch-size has no effect: nothing is watched without --watch." in idle.err
    told = cli("batch", file, "--dry-run", "--watch", "nobody")
    assert "nobody: 0 models are there; those that appear later are added" in told.out


def test_a_list_may_hold_its_defaults_alone(model: Path, hub: HubServer, file: Path, cli: CommandLine) -> None:
    """What is watched, or added, fills it."""
    write_list(file, [], **QUICK)
    refused = cli("batch", file)
    assert (refused.code, "look for new ones with --watch" in refused.err) == (2, True)
    assert cli("batch", "status", file).code == 2
    done = cli("batch", file, "--watch", "trending", "--watch-for", "0s", "--json")
    assert done.code == 0, done.err
    assert [(each["model"], each["state"]) for each in done.document["batch"]["models"]] == [("org/llama", "done")]
    assert "trending was watched" in cli("batch", "status", file).out
    assert "1 done" in cli("batch", file).out
