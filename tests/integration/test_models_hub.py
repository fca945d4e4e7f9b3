"""Downloads from a real local hub server: what arrives, what travels, and what each trouble says."""

from __future__ import annotations

import gzip
import json
import os
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from imatrix_runner.cluster.node_worker import Node
from imatrix_runner.cluster.shared_files import AbsentFileError, SharedFile
from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.errors import DownloadError, InterruptedRunError, InvalidDataError, NoSpaceError, UsageError
from imatrix_runner.events import Event, Finished, Progress, Started, ignore
from imatrix_runner.models.hub import Downloaded, fetch_model, reachability, token_source
from imatrix_runner.models.model import HubId, open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.store import cache_dir
from support.hub_server import HubServer, be_quick_and_anonymous
from support.hub_trouble import Trouble
from support.tiny_models import write_hf_directory, write_llama_gguf

TOKEN = "hf_" + "secret" * 5


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_llama_gguf(tmp_path_factory.mktemp("hub") / "tiny-BF16.gguf", layers=1).read_bytes()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _quick_and_anonymous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_quick_and_anonymous(monkeypatch, tmp_path)


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def fetch(
    hub: HubServer, text: str, cache: Path, sink: Listener | None = None, stop: Stop | None = None, **more: bool
) -> Downloaded:
    repo, _, file = text.partition(":")
    name, _, revision = repo.partition("@")
    hub_id = HubId(name, revision or None, file or None)
    return fetch_model(hub_id, stop=stop or Stop(), sink=sink or ignore, endpoint=hub.endpoint, cache=cache, **more)


def refusal(hub: HubServer, text: str, cache: Path) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        fetch(hub, text, cache)
    error = caught.value
    assert error.exit_code == 4
    assert all((error.what, error.why, error.todo))
    chain: BaseException | None = error
    while chain is not None:
        assert TOKEN not in str(chain)
        chain = chain.__cause__
    assert not list(cache.rglob("*.incomplete"))
    return error


def test_downloads_a_gguf_by_id(hub: HubServer, cache: Path, gguf: bytes) -> None:
    repository = hub.add("org/tiny", {"tiny-BF16.gguf": gguf, "tiny-Q8_0.gguf": b"unwanted"})
    listener = Listener()
    got = fetch(hub, "org/tiny", cache, listener)
    assert got.kind == "gguf"
    assert got.commit == repository.commit
    assert got.path.read_bytes() == gguf
    assert got.source.repo == "org/tiny"
    assert open_gguf(got.path, allow_requantize=False, name="tiny", source=got.source).source.commit == repository.commit
    assert hub.downloads() == ["tiny-BF16.gguf"]
    started, finished = listener.of(Started)[0], listener.of(Finished)[0]
    assert isinstance(started, Started)
    assert started.total == len(gguf)
    assert isinstance(finished, Finished)
    assert finished.status == "done"
    last = listener.of(Progress)[-1]
    assert isinstance(last, Progress)
    assert last.done == last.total == len(gguf)


def test_every_request_names_the_commit(hub: HubServer, cache: Path, gguf: bytes) -> None:
    repository = hub.add("org/tiny", {"tiny-BF16.gguf": gguf}, revisions={"main", "v1"})
    fetch(hub, "org/tiny@v1", cache)
    resolved = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert resolved
    assert all(f"/resolve/{repository.commit}/" in path for path in resolved)


def test_the_second_time_nothing_is_downloaded(hub: HubServer, cache: Path, gguf: bytes) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    fetch(hub, "org/tiny", cache)
    hub.requests.clear()
    listener = Listener()
    fetch(hub, "org/tiny", cache, listener)
    assert hub.downloads() == []
    finished = listener.of(Finished)[0]
    assert isinstance(finished, Finished)
    assert finished.status == "skipped"


def test_a_damaged_copy_in_the_cache_is_fetched_again(hub: HubServer, cache: Path, gguf: bytes) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    first = fetch(hub, "org/tiny", cache)
    first.path.resolve().write_bytes(gguf[:1000])
    assert fetch(hub, "org/tiny", cache).path.read_bytes() == gguf


def test_a_content_that_was_not_announced_is_refused_and_not_kept(hub: HubServer, cache: Path, gguf: bytes) -> None:
    """Length and name are right; only the SHA-256 of the listing tells."""
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(altered=True)
    error = refusal(hub, "org/tiny", cache)
    assert "other content than announced" in error.what
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size == len(gguf)]
    hub.trouble = Trouble()
    assert fetch(hub, "org/tiny", cache).path.read_bytes() == gguf


def test_downloads_a_checkpoint_without_its_code(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    directory = write_hf_directory(tmp_path / "hf", layers=1, shards=2)
    (directory / "modeling.py").write_text("raise SystemExit")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add_directory("org/hf", directory)
    listener = Listener()
    got = fetch(hub, "org/hf", cache, listener)
    assert got.kind == "checkpoint"
    names = {path.name for path in got.path.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"} <= names
    assert not names & {"modeling.py", "pytorch_model.bin"}
    done = [event.done for event in listener.events if isinstance(event, Progress)]
    assert done == sorted(done)
    assert done[-1] == sum(path.stat().st_size for path in got.files)
    assert "modeling.py" in {path.name for path in fetch(hub, "org/hf", cache, trust_remote_code=True).files}


def test_downloads_a_split_set(hub: HubServer, cache: Path, gguf: bytes) -> None:
    names = [f"BF16/m-BF16-{number:05d}-of-00002.gguf" for number in (1, 2)]
    hub.add("org/split", {names[0]: gguf, names[1]: gguf + b"2"})
    got = fetch(hub, f"org/split:{names[1]}", cache)
    assert [path.name for path in got.files] == [Path(name).name for name in names]
    assert got.path.name == Path(names[0]).name


def test_the_token_travels_to_the_hub_only_in_its_header(
    hub: HubServer, cache: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/secret", {"m-BF16.gguf": gguf}, private=True, gated=True)
    assert token_source() is None
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert token_source() == "HF_TOKEN"
    fetch(hub, "org/secret", cache)
    assert all(request.headers.get("authorization") == f"Bearer {TOKEN}" for request in hub.requests)
    assert not any(TOKEN in request.path for request in hub.requests)


def test_gated(hub: HubServer, cache: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", {"m-BF16.gguf": gguf}, gated=True, accepted=False)
    error = refusal(hub, "org/gated", cache)
    assert "is gated" in error.what
    assert "HF_TOKEN" in error.todo
    assert f"{hub.endpoint}/org/gated" in error.todo
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "your account has not" in refusal(hub, "org/gated", cache).why


def test_missing_and_private_repositories(hub: HubServer, cache: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/private", {"m-BF16.gguf": gguf}, private=True)
    assert "does not exist or is private" in refusal(hub, "org/private", cache).what
    assert "does not exist or is private" in refusal(hub, "org/absent", cache).what
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "No repository org/absent" in refusal(hub, "org/absent", cache).what
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "did not accept your token" in refusal(hub, "org/private", cache).what


def test_a_bare_404_is_a_missing_repository(hub: HubServer, cache: Path) -> None:
    hub.trouble = Trouble(status=404)
    assert "No repository" in refusal(hub, "org/absent", cache).what


def test_missing_revision_and_file(hub: HubServer, cache: Path, gguf: bytes) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    assert "has no revision v9" in refusal(hub, "org/tiny@v9", cache).what
    error = refusal(hub, "org/tiny:tiny-F16.gguf", cache)
    assert "has no file" in error.what
    assert "tiny-BF16.gguf" in error.why


@pytest.mark.parametrize("bare", [False, True])
def test_a_file_that_is_listed_but_gone(hub: HubServer, cache: Path, gguf: bytes, bare: bool) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(gone={"tiny-BF16.gguf"}, bare_404=bare)
    assert refusal(hub, "org/tiny", cache).todo


def test_nothing_that_fits(hub: HubServer, cache: Path) -> None:
    hub.add("org/quants", {"m-Q4_0.gguf": b"x"}, card={"base_model": ["org/base"]})
    with pytest.raises(InvalidDataError, match="already quantised") as caught:
        fetch(hub, "org/quants", cache)
    assert "imatrix-runner run org/base" in caught.value.todo


def test_a_checkpoint_that_cannot_be_converted_costs_only_its_configuration(hub: HubServer, cache: Path) -> None:
    config = b'{"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "awq", "bits": 4}}'
    files = {"README.md": b"", "config.json": config, "model.safetensors": bytes(5000), "tokenizer.json": b"{}"}
    hub.add("org/awq", files, card={"base_model": "org/base"})
    with pytest.raises(InvalidDataError, match="quantised with AWQ") as caught:
        fetch(hub, "org/awq", cache)
    assert "imatrix-runner run org/base" in caught.value.todo
    assert hub.downloads() == ["config.json"]


def test_a_repository_for_another_program_is_named(hub: HubServer, cache: Path) -> None:
    hub.add("org/onnx", {"config.json": b"{}", "onnx/model.onnx": b"x"}, card={"base_model": "org/base"})
    with pytest.raises(InvalidDataError, match="org/onnx is an ONNX export") as caught:
        fetch(hub, "org/onnx", cache)
    assert "imatrix-runner run org/base" in caught.value.todo


def test_a_cut_connection_continues_where_it_was(hub: HubServer, cache: Path, gguf: bytes) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(cut_after=len(gguf) // 3)
    assert fetch(hub, "org/tiny", cache).path.read_bytes() == gguf
    assert any("range" in request.headers for request in hub.requests)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_cut_for_ever_ends_with_exit_4(hub: HubServer, cache: Path, gguf: bytes, ranges: bool) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(cut_after=0 if ranges else 1000, ranges=ranges)
    assert "was cut" in refusal(hub, "org/tiny", cache).what


def test_passing_trouble_is_tried_again(hub: HubServer, cache: Path, gguf: bytes) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(status=500, status_times=2)
    assert fetch(hub, "org/tiny", cache).path.read_bytes() == gguf
    hub.trouble = Trouble(status=429, status_times=1, retry_after=1)
    fetch(hub, "org/tiny", cache)


def test_lasting_trouble_is_told(hub: HubServer, cache: Path) -> None:
    hub.add("org/tiny", {"m-BF16.gguf": b"x"})
    hub.trouble = Trouble(status=503)
    assert "HTTP status 503" in refusal(hub, "org/tiny", cache).why
    assert len(hub.requests) == 3
    hub.trouble = Trouble(status=429, retry_after=7)
    assert "limits the rate" in refusal(hub, "org/tiny", cache).what


@pytest.mark.parametrize("trouble", [Trouble(html=True), Trouble(html_files=True)])
def test_a_web_page_instead(hub: HubServer, cache: Path, gguf: bytes, trouble: Trouble) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = trouble
    error = refusal(hub, "org/tiny", cache)
    assert "HF_ENDPOINT" in error.todo


def no_name(*_arguments: object, **_more: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_ids_that_no_hub_has(cache: Path) -> None:
    with pytest.raises(UsageError, match="not a hub id"):
        fetch_model(HubId("org/name-"), stop=Stop(), sink=ignore, endpoint="http://127.0.0.1:9", cache=cache)


def test_no_network(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", {"m-BF16.gguf": b"x"})
    stop, hub_id = Stop(), HubId("org/tiny")
    with pytest.raises(DownloadError, match="refused"):
        fetch_model(hub_id, stop=stop, sink=ignore, endpoint="http://127.0.0.1:9", cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", no_name)
        with pytest.raises(DownloadError, match="resolved"):
            fetch_model(hub_id, stop=stop, sink=ignore, endpoint="http://absent.invalid", cache=cache)
    with pytest.raises(DownloadError, match="not a web address"):
        fetch_model(hub_id, stop=stop, sink=ignore, endpoint="nonsense", cache=cache)
    monkeypatch.setattr("imatrix_runner.models.hub.listing.LISTING_SECONDS", 0.1)
    hub.trouble = Trouble(silence=0.4)
    assert "does not answer" in refusal(hub, "org/tiny", cache).what


def test_offline(hub: HubServer, cache: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "is not in the cache" in refusal(hub, "org/tiny", cache).what
    monkeypatch.delenv("HF_HUB_OFFLINE")
    online = fetch(hub, "org/tiny", cache)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for text in ("org/tiny", f"org/tiny@{repository.commit}", "org/tiny:tiny-BF16.gguf"):
        got = fetch(hub, text, cache)
        assert (got.path, got.commit) == (online.path, online.commit)
    assert "is not in the cache" in refusal(hub, "org/tiny:other.gguf", cache).what
    assert "is not in the cache" in refusal(hub, "org/tiny@v2", cache).what
    assert hub.requests == []


def test_disk_space_is_checked_first(hub: HubServer, cache: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    monkeypatch.setattr("imatrix_runner.models.hub.fetch.free_bytes", lambda _path: 1000)
    with pytest.raises(NoSpaceError, match="1000 B free") as caught:
        fetch(hub, "org/tiny", cache)
    assert "HF_HOME" in caught.value.todo
    assert hub.downloads() == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes last for tenths of seconds."""
    monkeypatch.setattr("imatrix_runner.downloads.PACE_SECONDS", 0.3)
    monkeypatch.setattr("imatrix_runner.models.hub.transfer.ANSWER_SECONDS", 0.5)


def test_a_listing_that_unpacks_to_gigabytes_is_given_up_before(hub: HubServer, cache: Path) -> None:
    zeros = zlib.compressobj(wbits=31)
    hub.trouble = Trouble(packed_listing=b"".join([*(zeros.compress(bytes(1 << 20)) for _ in range(256)), zeros.flush()]))
    tracemalloc.start()
    try:
        error = refusal(hub, "org/tiny", cache)
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()
    assert "sends too long an answer" in error.what
    assert "32.00 MiB" in error.why
    assert len(hub.requests) == 1


def test_a_packed_listing_is_read(hub: HubServer, cache: Path, gguf: bytes) -> None:
    held = hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    listing = {"id": "org/tiny", "sha": held.commit, "siblings": [{"rfilename": "tiny-BF16.gguf", "size": len(gguf)}]}
    hub.trouble = Trouble(packed_listing=gzip.compress(json.dumps(listing).encode()))
    assert fetch(hub, "org/tiny", cache).path.read_bytes() == gguf
    hub.trouble.packed_listing = b"\x1f\x8b not gzip"
    assert refusal(hub, "org/tiny", cache).exit_code == 4


@pytest.mark.usefixtures("impatient")
def test_a_listing_that_drips_is_given_up(hub: HubServer, cache: Path, gguf: bytes) -> None:
    """Each byte comes in time; all of them would take minutes."""
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(listing_bytes_per_second=20)
    began = time.monotonic()
    error = refusal(hub, "org/tiny", cache)
    assert time.monotonic() - began < 10
    assert "sends too slowly" in error.what
    assert "0.5 s" in error.why


@pytest.mark.usefixtures("impatient")
def test_a_file_that_drips_is_tried_again_and_given_up(hub: HubServer, cache: Path, gguf: bytes) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(bytes_per_second=50)
    began = time.monotonic()
    error = refusal(hub, "org/tiny", cache)
    assert time.monotonic() - began < 10
    assert "sends too slowly" in error.what
    assert hub.downloads() == ["tiny-BF16.gguf"] * 3
    assert not list(cache.rglob("*.incomplete"))


@pytest.mark.usefixtures("impatient")
def test_a_file_that_dripped_once_arrives(hub: HubServer, cache: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(bytes_per_second=50)
    threading.Timer(0.5, lambda: setattr(hub.trouble, "bytes_per_second", 0.0)).start()
    assert fetch(hub, "org/tiny", cache).path.read_bytes() == gguf
    assert len(hub.downloads()) >= 2


def test_a_stop_is_heard_between_two_pieces(hub: HubServer, cache: Path, gguf: bytes) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": gguf})
    hub.trouble = Trouble(bytes_per_second=400_000)
    stop = Stop()

    def sink(event: Event) -> None:
        if isinstance(event, Progress):
            stop.request()

    with pytest.raises(InterruptedRunError):
        fetch_model(HubId("org/tiny"), stop=stop, sink=sink, endpoint=hub.endpoint, cache=cache)
    assert not list(cache.rglob("*.gguf"))
    assert not list(cache.rglob("*.incomplete"))


def test_a_stop_is_heard_while_the_hub_is_silent(hub: HubServer, cache: Path) -> None:
    hub.add("org/tiny", {"tiny-BF16.gguf": b"x"})
    hub.trouble = Trouble(silence=1.5)
    stop = Stop()
    threading.Timer(0.2, stop.request).start()
    with pytest.raises(InterruptedRunError):
        fetch_model(HubId("org/tiny"), stop=stop, sink=ignore, endpoint=hub.endpoint, cache=cache)


def test_reachability(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is reachable" in reachability(hub.endpoint)
    hub.trouble = Trouble(status=500)
    assert "HTTP status 500" in reachability(hub.endpoint)
    assert "refused" in reachability("http://127.0.0.1:9")
    monkeypatch.setattr("imatrix_runner.models.hub.fetch._DOCTOR_SECONDS", 0.2)
    hub.trouble = Trouble(silence=0.6)
    assert "does not answer" in reachability(hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline" in reachability(hub.endpoint)


def test_the_token_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "no-token").write_text(TOKEN)
    assert token_source() == "token file"


def test_a_machine_of_a_cluster_gets_a_model_from_the_hub_itself(
    hub: HubServer, cache: Path, gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("org/tiny", {"BF16/tiny-BF16.gguf": gguf})
    path = fetch(hub, "org/tiny", cache).path
    file = SharedFile.of(path)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "there"))
    engine = EmbeddedEngine(find(os.environ, cache_dir()), Runner())
    node = Node(engine, tmp_path / "scratch", 1, shares=False, stop=Stop())
    found = node.local(file)
    assert found.is_relative_to(tmp_path / "there")
    assert found.read_bytes() == gguf
    other = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40) / "tiny-BF16.gguf"
    other.parent.mkdir(parents=True)
    other.write_bytes(gguf)
    with pytest.raises(AbsentFileError, match="the hub: "):  # no such commit: the driver sends it
        node.local(SharedFile.of(other))
