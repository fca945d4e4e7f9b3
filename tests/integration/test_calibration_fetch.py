"""Public calibration texts from loopback servers: fetched once, checked, recorded, and never half there."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from imatrix_runner.calibration.public import download_set
from imatrix_runner.calibration.public.sets import FetchedSet, fetch_set, list_sets
from imatrix_runner.context.context import Context
from imatrix_runner.errors import DownloadError, InterruptedRunError, InvalidDataError, RunnerError, ToolchainError, UsageError
from imatrix_runner.events import Event, Notice, Progress
from imatrix_runner.extras import Extra
from imatrix_runner.signals import Stop
from support.command_line import run_command
from support.hub_server import HubServer, be_quick_and_anonymous
from support.hub_trouble import Trouble
from support.in_process import CommandLine

V3 = "/bartowski1182/eb213dccb3571f863da82e99418f81e8/raw/calibration_datav3.txt"
CODE = "/turboderp-org/exllamav3/master/exllamav3/conversion/standard_cal_data/code.utf8"
TEXT = "Ein Satz, der zählt.\n".encode() * 20_000
EADDARIO = "datasets/eaddario/imatrix-calibration"


@dataclass
class Site:
    """Plain files over HTTP. ``cut``: bytes after which the connection breaks, one per request."""

    url: str = ""
    pages: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    announce: bool = True


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    served = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append((self.path, dict(self.headers)))
            status, headers = served.statuses.get(self.path, (200 if self.path in served.pages else 404, {}))
            data = served.pages.get(self.path, b"404: Not Found")
            self.send_response(status)
            for name, value in {"Content-Type": "text/plain; charset=utf-8", **headers}.items():
                self.send_header(name, value)
            if served.announce:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            cuts = served.cut.get(self.path)
            try:
                self.wfile.write(data[: cuts.pop(0)] if cuts else data)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client had enough: some tests want just that

        def log_message(self, *args: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("IMATRIX_RUNNER_CALIBRATION_URL", served.url)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield served
        server.shutdown()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(autouse=True)
def _quick_and_anonymous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_quick_and_anonymous(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("IMATRIX_RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def warned(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice) and event.level == "warning"]


def fetch(name: str, listener: Listener | None = None, stop: Stop | None = None, **more: bool) -> FetchedSet:
    return fetch_set(name, Context(listener or Listener(), stop or Stop()), **more)


def kept(cache: Path = Path("cache")) -> list[str]:
    """All files of the cache, locks aside."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def refusal(name: str, **more: bool) -> RunnerError:
    """The error of a fetch that changes nothing in the cache."""
    before = kept()
    with pytest.raises(RunnerError) as caught:
        fetch(name, **more)
    assert kept() == before
    assert all((caught.value.what, caught.value.why, caught.value.todo))
    return caught.value


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


# Plain files


def test_a_text_is_fetched_once_and_recorded(site: Site) -> None:
    site.pages[V3] = TEXT
    listener = Listener()
    fetched = fetch("bartowski-v3", listener)
    assert fetched.path == Path("cache/calibration/bartowski-v3/calibration_datav3.txt").absolute()
    assert fetched.path.read_bytes() == TEXT
    record = json.loads(fetched.path.with_name("calibration_datav3.txt.json").read_text())
    digest = hashlib.sha256(TEXT).hexdigest()
    assert (record["name"], record["source"], record["licence"]) == ("bartowski-v3", site.url + V3, "not stated")
    assert (record["bytes"], record["sha256"], record["source_sha256"]) == (len(TEXT), digest, digest)
    assert record["date"].startswith("20")
    assert (fetched.sha256, fetched.licence, fetched.origin) == (digest, "not stated", site.url + V3)
    assert (fetched.was_cached, fetched.replaced) == (False, None)
    progress = [event for event in listener.events if isinstance(event, Progress)]
    assert (progress[-1].done, progress[-1].total) == (len(TEXT), len(TEXT))
    again = fetch("bartowski-v3")
    assert (again.path, again.record, again.was_cached) == (fetched.path, fetched.record, True)
    assert len(site.asked) == 1


def test_nobody_hears_a_token(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, "hf_secret")
    site.pages[V3] = TEXT
    fetch("bartowski-v3")
    assert "secret" not in str(site.asked)


def test_one_text_of_several_is_named(site: Site) -> None:
    site.pages[CODE] = b"def f(): ...\n"
    assert fetch("exllamav3:code").path.name == "code.utf8"
    assert fetch("exllamav3:code.utf8").was_cached
    error = refusal("exllamav3")
    assert isinstance(error, UsageError)
    assert error.why == "c4, code, multilingual, technical, tiny, wiki"
    assert isinstance(refusal("exllamav3:nonsense"), UsageError)
    assert len(site.asked) == 1


def test_a_redirect_is_followed(site: Site) -> None:
    site.statuses[V3] = (302, {"Location": "/elsewhere/v3.txt"})
    site.pages["/elsewhere/v3.txt"] = TEXT
    assert fetch("bartowski-v3").path.read_bytes() == TEXT
    assert [path for path, _ in site.asked] == [V3, "/elsewhere/v3.txt"]
    site.statuses["/loop"] = (302, {"Location": "/loop"})
    site.statuses[V3] = (302, {"Location": "/loop"})
    assert "could not be downloaded" in refusal("bartowski-v3", force=True).what


def test_a_mirror_may_have_a_path_and_a_password(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/mirror" + V3] = TEXT
    monkeypatch.setenv("IMATRIX_RUNNER_CALIBRATION_URL", site.url.replace("//", "//me:hunter2@") + "/mirror/")
    fetched = fetch("bartowski-v3")
    assert fetched.origin == f"{site.url}/mirror{V3}"
    assert all("hunter2" not in path.read_text() for path in fetched.path.parent.glob("*.json"))


@pytest.mark.parametrize("mirror", ["ftp://x", "nonsense", "http://", "http://x:port", "http://[", "http://x/?a=1"])
def test_a_mirror_that_is_no_address(site: Site, monkeypatch: pytest.MonkeyPatch, mirror: str) -> None:
    monkeypatch.setenv("IMATRIX_RUNNER_CALIBRATION_URL", mirror)
    error = refusal("bartowski-v3")
    assert isinstance(error, UsageError)
    assert "IMATRIX_RUNNER_CALIBRATION_URL" in error.what


# What may go wrong


def test_a_text_that_moved_away(site: Site) -> None:
    error = refusal("bartowski-v3")
    assert isinstance(error, DownloadError)
    assert (error.exit_code, error.what) == (4, "bartowski-v3 does not exist")
    assert error.why == f"{site.url}{V3} answered 404"
    assert "https://gist.github.com/bartowski1182/eb213dccb3571f863da82e99418f81e8" in error.todo
    assert "llama.cpp" not in error.todo


@pytest.mark.parametrize(("status", "said"), [(403, "was refused"), (429, "was refused"), (500, "could not be downloaded")])
def test_a_server_that_refuses(site: Site, status: int, said: str) -> None:
    site.statuses[V3] = (status, {})
    error = refusal("bartowski-v3")
    assert said in error.what
    assert "tools build" not in error.todo
    assert len(site.asked) == (3 if status == 500 else 1)


@pytest.mark.parametrize(
    ("page", "headers"),
    [
        (b"<!DOCTYPE html><html><body>Please log in.</body></html>", {}),
        (b"\xef\xbb\xbf\n  <HTML><body>Please log in.</body></html>", {}),
        (b"Please log in.", {"Content-Type": "text/html; charset=utf-8"}),
    ],
)
def test_a_login_page_is_no_text(site: Site, page: bytes, headers: dict[str, str]) -> None:
    site.pages[V3], site.statuses[V3] = page, (200, headers)
    error = refusal("bartowski-v3")
    assert isinstance(error, DownloadError)
    assert error.what == "Received a web page instead of bartowski-v3"
    assert "127.0.0.1" in error.why


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"a\0b", "NUL bytes"),
        ("é".encode("latin-1"), "byte 0 is not valid UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(site: Site, data: bytes, why: str) -> None:
    site.pages[V3] = data
    error = refusal("bartowski-v3")
    assert error.what == "bartowski-v3 is not a text"
    assert why in error.why


def test_a_cut_connection_is_tried_again(site: Site) -> None:
    site.pages[V3] = TEXT
    site.cut[V3] = [1000, len(TEXT) - 1]
    assert fetch("bartowski-v3").n_bytes == len(TEXT)
    assert len(site.asked) == 3


def test_a_length_that_never_comes_leaves_nothing(site: Site) -> None:
    site.pages[V3] = TEXT
    site.cut[V3] = [1000] * 9
    assert refusal("bartowski-v3").what == "The download of bartowski-v3 was cut off"


@pytest.mark.parametrize("announce", [True, False])
def test_more_than_the_limit_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch, announce: bool) -> None:
    monkeypatch.setattr(download_set, "MOST_BYTES", len(TEXT) - 1)
    site.pages[V3], site.announce = TEXT, announce
    error = refusal("bartowski-v3")
    assert error.what == "bartowski-v3 is too large"
    monkeypatch.setattr(download_set, "MOST_BYTES", len(TEXT))
    assert fetch("bartowski-v3").n_bytes == len(TEXT)


def test_nobody_answers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMATRIX_RUNNER_CALIBRATION_URL", "http://127.0.0.1:9")
    error = refusal("bartowski-v3")
    assert error.what == "bartowski-v3 could not be reached"
    assert "--offline" in error.todo


def test_a_stop_between_two_blocks_leaves_nothing(site: Site) -> None:
    site.pages[V3] = TEXT * 10
    stop = Stop()

    def sink(event: Event) -> None:
        if isinstance(event, Progress):
            stop.request()

    with pytest.raises(InterruptedRunError):
        fetch_set("bartowski-v3", Context(sink, stop))
    assert kept() == []


# The cache


def test_a_damaged_text_is_fetched_again_and_told_of(site: Site) -> None:
    site.pages[V3] = TEXT
    path = fetch("bartowski-v3").path
    for damage in (b"X" + TEXT[1:], None):
        path.unlink() if damage is None else path.write_bytes(damage)
        listener = Listener()
        fetched = fetch("bartowski-v3", listener)
        assert not fetched.was_cached
        assert fetched.replaced is None  # upstream did not change
        assert path.read_bytes() == TEXT
        (warned,) = listener.warned
        assert warned == f"{path} " + ("is missing." if damage is None else warned.removeprefix(f"{path} "))
        assert "SHA-256" in warned or damage is None
    path.write_bytes(b"X")
    with pytest.raises(DownloadError, match="not in the cache"):
        fetch("bartowski-v3", offline=True)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"name": 1}', b"[]"])
def test_a_damaged_record_is_made_again(site: Site, damage: bytes) -> None:
    site.pages[V3] = TEXT
    fetched = fetch("bartowski-v3")
    note = fetched.path.with_name(f"{fetched.path.name}.json")
    note.write_bytes(damage)
    assert [listed.fetched for listed in list_sets() if listed.set.name == "bartowski-v3"] == [()]
    listener = Listener()
    assert fetch("bartowski-v3", listener).record.sha256 == fetched.sha256
    assert "cannot be checked" in listener.warned[0]
    assert fetch("bartowski-v3").was_cached


def test_a_change_upstream_is_seen_when_asked_for(site: Site) -> None:
    site.pages[V3] = TEXT
    first = fetch("bartowski-v3")
    assert fetch("bartowski-v3", force=True).replaced is None
    site.pages[V3] = TEXT + b"More.\n"
    assert fetch("bartowski-v3").sha256 == first.sha256
    listener = Listener()
    forced = fetch("bartowski-v3", listener, force=True)
    assert forced.replaced is not None
    assert (forced.replaced.sha256, forced.path.read_bytes()) == (first.sha256, TEXT + b"More.\n")
    (warned,) = listener.warned
    assert first.sha256 in warned
    assert forced.sha256 in warned


def test_a_failed_force_keeps_what_was_there(site: Site) -> None:
    site.pages[V3] = TEXT
    fetch("bartowski-v3")
    site.pages[V3] = b"<html>"
    refusal("bartowski-v3", force=True)
    assert fetch("bartowski-v3").path.read_bytes() == TEXT


def test_offline_gives_only_what_was_fetched(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages[V3] = TEXT
    error = refusal("bartowski-v3", offline=True)
    assert error.what == "bartowski-v3 is not in the cache"
    assert error.todo == "Fetch it once online: imatrix-runner calibration fetch bartowski-v3"
    assert site.asked == []
    fetch("bartowski-v3")
    assert fetch("bartowski-v3", offline=True, force=True).was_cached
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("bartowski-v3").was_cached
    assert "not in the cache" in refusal("eaddario:tools_micro").what
    assert len(site.asked) == 1


@pytest.mark.parametrize("renames", [1, 2])
@pytest.mark.parametrize("forced", [False, True])
def test_a_kill_between_text_and_record_leaves_nothing_believed(site: Site, tmp_path: Path, renames: int, forced: bool) -> None:
    site.pages[V3] = TEXT
    if forced:
        fetch("bartowski-v3")
        site.pages[V3] = TEXT + b"More.\n"
    env = {"IMATRIX_RUNNER_CACHE": str(tmp_path / "cache"), "IMATRIX_RUNNER_CALIBRATION_URL": site.url}
    words = ("calibration", "fetch", "bartowski-v3", *(["--force"] if forced else []))
    ran = run_command(*words, cwd=tmp_path, env=env, dies_after=renames)
    assert ran.code == -9
    asked = len(site.asked)
    listener = Listener()
    fetched = fetch("bartowski-v3", listener)
    assert fetched.was_cached == (renames == 2)
    assert len(site.asked) == asked + (renames == 1)
    assert bool(listener.warned) == (forced and renames == 1)
    assert fetched.path.read_bytes() == site.pages[V3]
    assert fetched.sha256 == hashlib.sha256(site.pages[V3]).hexdigest()
    assert len(kept()) == 2


# Sets on the hub


def test_a_text_from_the_hub(hub: HubServer) -> None:
    commit = hub.add("datasets/froggeric/imatrix", {"groups_merged.txt": TEXT, "technical.txt": b"Bolt.\n"}).commit
    fetched = fetch("groups-merged")
    assert (fetched.path.name, fetched.path.read_bytes(), fetched.name) == ("groups_merged.txt", TEXT, "groups-merged")
    assert (fetched.origin, fetched.licence) == (f"froggeric/imatrix@{commit}:groups_merged.txt", "not stated")
    hub.requests.clear()
    assert fetch("groups-merged").was_cached
    assert hub.requests == []


def test_an_open_set_is_listed_by_the_hub(hub: HubServer) -> None:
    hub.add("datasets/froggeric/imatrix", {"technical.txt": b"Bolt.\n", "ptb.train.txt": b"no\n", "README.md": b"#"})
    assert fetch("froggeric:ptb.train").path.name == "ptb.train.txt"
    error = refusal("froggeric")
    assert error.why == "ptb.train, technical"
    assert error.todo == "Name one of them, for example: froggeric:ptb.train"
    assert refusal("froggeric:techncal").todo.endswith("froggeric:technical")
    assert hub.downloads() == ["ptb.train.txt"]
    hub.requests.clear()
    assert fetch("froggeric:ptb.train.txt").was_cached
    error = refusal("froggeric:technical", offline=True)
    assert "the cache has froggeric:ptb.train" in error.why
    assert hub.requests == []


def test_a_text_in_parquet_needs_the_extra_before_it_is_downloaded(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(EADDARIO, {"combined_en_small.parquet": parquet(content=["One."])}, card={"license": "mit"})
    monkeypatch.setattr("imatrix_runner.calibration.public.download_set.CALIBRATION", Extra("calibration", ("no_such_module",)))
    error = refusal("eaddario:combined_en_small")
    assert isinstance(error, ToolchainError)
    assert error.todo == 'Install them with: pip install "imatrix-runner[calibration]"'
    assert "combined_en_small.parquet" not in hub.downloads()


def test_a_table_becomes_one_text(hub: HubServer) -> None:
    data = parquet(content=["First prompt.\n", "", "Zweite Frage?"])
    commit = hub.add(EADDARIO, {"combined_en_small.parquet": data}, card={"license": "mit"}).commit
    fetched = fetch("eaddario:combined_en_small")
    assert fetched.path.name == "combined_en_small.txt"
    assert fetched.path.read_text() == "First prompt.\n\nZweite Frage?\n"
    record = fetched.record
    assert (record.name, record.licence) == ("eaddario:combined_en_small", "mit")
    assert record.source == f"eaddario/imatrix-calibration@{commit}:combined_en_small.parquet"
    assert record.source_sha256 == hashlib.sha256(data).hexdigest()
    assert (record.documents, record.converted) == (2, "from Parquet: 2 documents, separated by one blank line")
    hub.requests.clear()
    for spelling in ("combined_en_small", "combined_en_small.parquet"):
        assert fetch(f"eaddario:{spelling}").was_cached
    assert hub.requests == []
    assert fetch("eaddario:combined_en_small", force=True).sha256 == fetched.sha256


def test_wikitext_is_its_own_lines(hub: HubServer) -> None:
    rows = ["", " = Title = \n", "", " A sentence . \n"]
    hub.add("datasets/Salesforce/wikitext", {"wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet(text=rows)})
    fetched = fetch("wikitext-2:test")
    assert (fetched.path.name, fetched.path.read_text()) == ("wiki.test.raw", " \n = Title = \n \n A sentence . \n")
    assert fetched.licence == "CC BY-SA 3.0 and GFDL"
    assert refusal("wikitext-2:train").why == "it existed when this program's list of sets was made"


def test_a_table_without_texts_or_too_large(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "code_tiny.parquet": parquet(a=["x"], b=["y"]),
        "math_tiny.parquet": b"PAR1" * 9,
        "tools_tiny.parquet": b"x" * 5000,
    }
    hub.add(EADDARIO, files)
    assert isinstance(refusal("eaddario:code_tiny"), InvalidDataError)
    assert isinstance(refusal("eaddario:math_tiny"), InvalidDataError)
    monkeypatch.setattr(download_set, "MOST_BYTES", 4000)
    assert refusal("eaddario:tools_tiny").what == "eaddario:tools_tiny is too large"
    assert "tools_tiny.parquet" not in hub.downloads()


@pytest.mark.parametrize("trouble", [Trouble(html=True), Trouble(html_files=True), Trouble(status=503), Trouble(cut_after=100)])
def test_trouble_with_the_hub_leaves_nothing(hub: HubServer, trouble: Trouble) -> None:
    hub.add("datasets/froggeric/imatrix", {"groups_merged.txt": TEXT})
    hub.trouble = trouble
    assert isinstance(refusal("groups-merged"), DownloadError)


def test_a_login_page_of_the_right_length_is_no_text(hub: HubServer) -> None:
    hub.add("datasets/froggeric/imatrix", {"groups_merged.txt": b"<html><body>Log in.</body></html>"})
    assert refusal("groups-merged").what == "Received a web page instead of groups-merged"


def test_a_private_or_missing_repository_is_told(hub: HubServer) -> None:
    hub.add("datasets/froggeric/imatrix", {"groups_merged.txt": TEXT}, private=True)
    assert refusal("groups-merged").what == "froggeric/imatrix does not exist or is private"


# The command line


def test_fetch_prints_the_path_and_what_to_type_next(site: Site, cli: CommandLine, tmp_path: Path) -> None:
    site.pages[V3] = TEXT
    ran = cli("calibration", "fetch", "bartowski-v3")
    path = tmp_path / "cache/calibration/bartowski-v3/calibration_datav3.txt"
    assert (ran.code, ran.out) == (0, f"{path}\n")
    assert f"imatrix-runner calibration inspect {path}\n" in ran.err
    assert f"imatrix-runner run MODEL -f {path}\n" in ran.err
    assert "licence: not stated" in ran.err
    again = cli("calibration", "fetch", "bartowski-v3", "--offline")
    assert (again.code, again.out) == (0, f"{path}\n")
    assert "It was fetched on 20" in again.err
    quiet = cli("calibration", "fetch", "bartowski-v3", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_output_is_a_copy_that_replaces_nothing_unasked(site: Site, cli: CommandLine, tmp_path: Path) -> None:
    site.pages[V3] = TEXT
    out = tmp_path / "mine.txt"
    out.write_bytes(b"mine")
    refused = cli("calibration", "fetch", "bartowski-v3", "-o", out)
    assert refused.code == 6
    assert "never overwritten" in refused.err
    assert (out.read_bytes(), site.asked) == (b"mine", [])
    done = cli("calibration", "fetch", "bartowski-v3", "-o", out, "--force")
    assert (done.code, done.out, out.read_bytes()) == (0, f"{out}\n", TEXT)
    assert f"inspect {out}\n" in done.err
    fresh = tmp_path / "new folder" / "v3.txt"
    assert cli("calibration", "fetch", "bartowski-v3", "-o", fresh).code == 0
    assert fresh.read_bytes() == TEXT
    assert len(site.asked) == 1


def test_fetch_as_a_document(site: Site, cli: CommandLine, tmp_path: Path) -> None:
    site.pages[V3] = TEXT
    ran = cli("calibration", "fetch", "bartowski-v3", "-o", tmp_path / "a.txt", "--json", "-q")
    document = ran.document
    assert (ran.code, ran.err) == (0, "")
    assert (document["schema"], document["version"], document["exit_code"]) == ("imatrix-runner/calibration-fetch", 1, 0)
    assert document["path"] == str(tmp_path / "a.txt")
    assert document["cached"] == str(tmp_path / "cache/calibration/bartowski-v3/calibration_datav3.txt")
    assert document["record"]["sha256"] == hashlib.sha256(TEXT).hexdigest()
    assert (document["was_cached"], document["replaced"]) == (False, None)
    assert document["next"][1] == f"imatrix-runner run MODEL -f {tmp_path / 'a.txt'}"
    site.pages[V3] = b"New.\n"
    changed = cli("calibration", "fetch", "bartowski-v3", "--force", "--json").document
    assert changed["replaced"]["sha256"] == document["record"]["sha256"]
    error = cli("calibration", "fetch", "nonsense", "--json")
    assert (error.code, error.document["error"]["kind"]) == (2, "usage")


def test_list_shows_parts_and_sets_and_asks_nobody(site: Site, hub: HubServer, cli: CommandLine) -> None:
    site.pages[CODE] = b"code\n"
    fetch("exllamav3:code")
    site.asked.clear()
    ran = cli("calibration", "list")
    assert (ran.code, ran.err) == (0, "")
    lines = {line.split()[0]: line for line in ran.out.splitlines() if line.strip()}
    assert lines["bartowski-v3"].rstrip().endswith(" no")
    assert lines["exllamav3"].rstrip().endswith(" code")
    assert " Salesforce/wikitext " in lines["wikitext-2"]
    assert " gist.github.com/bartowski1182 " in lines["bartowski-v3"]
    assert "wikitext-2: encyclopaedic English" in ran.out
    assert "https://huggingface.co/datasets/Salesforce/wikitext\n" in ran.out
    assert (site.asked, hub.requests) == ([], [])


def test_list_as_a_document(site: Site, cli: CommandLine) -> None:
    site.pages[V3] = TEXT
    fetched = fetch("bartowski-v3")
    ran = cli("calibration", "list", "--json")
    document = ran.document
    assert (ran.code, document["schema"], document["version"]) == (0, "imatrix-runner/calibration-list", 1)
    sets = {entry["name"]: entry for entry in document["sets"]}
    assert set(sets["eaddario"]) == {
        *("name", "kind", "size", "licence", "origin", "good_for", "texts", "more_texts", "fetched"),
    }
    assert sets["bartowski-v3"]["fetched"][0]["path"] == str(fetched.path)
    assert sets["bartowski-v3"]["fetched"][0]["sha256"] == fetched.sha256
    assert sets["bartowski-v3"]["texts"] == [{"name": "bartowski-v3", "bytes": 273000}]
    assert sets["exllamav3"]["fetched"] == []
    assert {entry["name"]: entry["bytes"] for entry in sets["exllamav3"]["texts"]}["exllamav3:code"] == 248834
    assert sum(part["share"] for part in document["parts"]) == pytest.approx(1)
    assert all(part["bytes"] > 0 for part in document["parts"])
