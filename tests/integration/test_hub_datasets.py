"""Data sets through a real local hub: which files are chosen, what is fetched, remembered and refused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from imatrix_runner.errors import DownloadError, InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError
from imatrix_runner.events import Event, Finished, Notice, Progress
from imatrix_runner.models.hub import FetchedDataset, Hub, fetch_dataset, parse_dataset
from imatrix_runner.models.hub.choose_files import RepoFile
from imatrix_runner.models.hub.dataset_tables import DatasetId, choose_table, converted_tables, named_tables
from imatrix_runner.signals import Stop
from support.hub_server import HubServer, be_quick_and_anonymous
from support.hub_trouble import Trouble

TOKEN = "hf_" + "secret" * 5
CONVERTED = "refs/convert/parquet"


@pytest.fixture(autouse=True)
def _quick_and_anonymous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_quick_and_anonymous(monkeypatch, tmp_path)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        yield server


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)


def parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), buffer)
    return buffer.getvalue()


def rows(fetched: FetchedDataset) -> list[str]:
    return [text for path in fetched.paths for text in pyarrow.parquet.read_table(path)["text"].to_pylist()]


def fetch(
    server: HubServer, text: str, tmp_path: Path, listener: Listener | None = None, offline: bool = False, **more: int
) -> FetchedDataset:
    wanted = parse_dataset(text)
    assert wanted is not None
    hub = Hub(Stop(), listener or Listener(), endpoint=server.endpoint, cache=tmp_path / "cache", offline=offline)
    return fetch_dataset(hub, wanted, **more)


def refusal(server: HubServer, text: str, tmp_path: Path, **more: int) -> RunnerError:
    with pytest.raises(RunnerError) as caught:
        fetch(server, text, tmp_path, **more)
    error = caught.value
    assert all((error.what, error.why, error.todo))
    assert TOKEN not in f"{error.what}{error.why}{error.todo}"
    assert not list(tmp_path.rglob("*.incomplete"))
    return error


# Names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", DatasetId("org/name")),
        ("org/name:en", DatasetId("org/name", None, "en")),
        ("org/name:en:test", DatasetId("org/name", None, "en", "test")),
        ("org/name::test", DatasetId("org/name", None, None, "test")),
        ("org/name@v1.0:wikitext-2-raw-v1:train", DatasetId("org/name", "v1.0", "wikitext-2-raw-v1", "train")),
        ("org/name@refs/convert/parquet", DatasetId("org/name", "refs/convert/parquet")),
        ("wikimedia/wikipedia:20231101.ab", DatasetId("wikimedia/wikipedia", None, "20231101.ab")),
    ],
)
def test_an_id_is_read_and_written_the_same(text: str, expected: DatasetId) -> None:
    assert parse_dataset(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "name", "a/b/c", "../name", "org/..", "/etc/passwd", "org/name@../../x", "org/name:..:train", "org/name:a/../b"),
        *(
            "data/talks.jsonl",
            "texts/wiki.txt",
            "C:\\texts",
            "org/name:en:test:more",
            "org/na me",
            "org/name:\x1b[2J",
            "https://x/y",
        ),
    ],
)
def test_what_is_no_id(text: str) -> None:
    assert parse_dataset(text) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet", {("default", "train"): 2}),
        ("data/train_sft-00000-of-00001-0123456789abcdef.parquet", {("default", "train_sft"): 1}),
        ("en/train-00000-of-00001.parquet fr/test-00000-of-00001.parquet", {("en", "train"): 1, ("fr", "test"): 1}),
        ("train.jsonl test.jsonl dev.jsonl", {("default", "train"): 1, ("default", "test"): 1, ("default", "validation"): 1}),
        ("en/train.parquet de/train.parquet", {("en", "train"): 1, ("de", "train"): 1}),
        ("train/00000.parquet train/00001.parquet", {("default", "train"): 2}),
        ("squad_train.json nq-test.json", {("squad", "train"): 1, ("nq", "test"): 1}),
        ("code.txt technical.txt README.txt LICENSE.txt", {("code", "train"): 1, ("technical", "train"): 1}),
        ("talks.jsonl", {("talks", "train"): 1}),
        # One table in two formats is one table.
        ("data.csv data.parquet", {("default", "train"): 1}),
        ("train.jsonl.gz images/1.png script.py dataset_infos.json .gitattributes", {}),
    ],
)
def test_names_tell_configs_and_splits(names: str, expected: dict[tuple[str, str], int]) -> None:
    tables = named_tables([RepoFile(name, 1) for name in names.split()])
    assert {(table.config, table.split): len(table.files) for table in tables} == expected
    assert all("data.csv" not in file.name for table in tables for file in table.files)


def test_a_conversion_has_one_layout() -> None:
    names = [
        "default/train/0001.parquet",
        "default/train/0000.parquet",
        "en/partial-test/0000.parquet",
        "x/y.parquet",
        "README.md",
    ]
    tables = converted_tables([RepoFile(name, 1) for name in names])
    assert [(table.config, table.split, table.partial) for table in tables] == [
        ("default", "train", False),
        ("en", "test", True),
    ]
    assert [file.name for file in tables[0].files] == ["default/train/0000.parquet", "default/train/0001.parquet"]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("o/n:en", "en train"), ("o/n:en:test", "en test"), ("o/n:fr", "fr all"), ("o/n:fr:all", "fr all")],
)
def test_the_usual_split_is_train_or_the_only_one(text: str, chosen: str) -> None:
    files = ["en/train/0000.parquet", "en/test/0000.parquet", "fr/all/0000.parquet"]
    wanted = parse_dataset(text)
    assert wanted is not None
    table = choose_table(wanted, converted_tables([RepoFile(name, 1) for name in files]))
    assert f"{table.config} {table.split}" == chosen


# Fetching


def test_the_hub_s_own_conversion_is_preferred(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {"train.jsonl": b"{}", "README.md": b"#"}, card={"license": "mit"})
    files = {f"default/{split}/000{n}.parquet": parquet(f"{split} {n}") for split in ("train", "test") for n in range(2)}
    branch = server.add_branch("datasets/org/talks", CONVERTED, files)
    listener = Listener()
    fetched = fetch(server, "org/talks", tmp_path, listener)
    assert rows(fetched) == ["train 0", "train 1"]
    assert (fetched.config, fetched.split, fetched.commit, fetched.branch) == ("default", "train", branch.commit, CONVERTED)
    assert fetched.licence == "mit"
    assert fetched.origin == f"org/talks@{branch.commit}:default:train"
    assert server.downloads() == ["default/train/0000.parquet", "default/train/0001.parquet"]
    assert any(isinstance(event, Progress) and event.done for event in listener.events)
    server.requests.clear()
    assert fetch(server, "org/talks", tmp_path) == fetched
    assert server.downloads() == []


def test_without_a_conversion_the_repository_s_own_files(server: HubServer, tmp_path: Path) -> None:
    added = server.add(
        "datasets/org/talks",
        {"data/train-00000-of-00001.parquet": parquet("a"), "data/test-00000-of-00001.parquet": parquet("b")},
        card={"license": ["cc-by-sa-3.0", "gfdl"]},
    )
    fetched = fetch(server, "org/talks::test", tmp_path)
    assert rows(fetched) == ["b"]
    assert (fetched.commit, fetched.branch, fetched.licence) == (added.commit, "main", "cc-by-sa-3.0, gfdl")
    assert fetched.paths[0].suffix == ".parquet"


def test_a_revision_is_read_as_it_is(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {"train.jsonl": b'{"text": "new"}\n'})
    server.add_branch("datasets/org/talks", CONVERTED, {"default/train/0000.parquet": parquet("new")})
    old = server.add_branch("datasets/org/talks", "v1.0", {"train.jsonl": b'{"text": "old"}\n'})
    fetched = fetch(server, "org/talks@v1.0", tmp_path)
    assert fetched.paths[0].read_bytes() == b'{"text": "old"}\n'
    assert (fetched.commit, fetched.branch) == (old.commit, "v1.0")
    named = fetch(server, f"org/talks@{CONVERTED}", tmp_path)
    assert (rows(named), named.config) == (["new"], "default")


def test_what_a_conversion_lacks_is_taken_from_the_repository(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {"en/train.jsonl": b"{}", "fr/train.jsonl": b"{}"})
    server.add_branch("datasets/org/talks", CONVERTED, {"en/train/0000.parquet": parquet("a")})
    assert fetch(server, "org/talks:fr", tmp_path).branch == "main"
    assert fetch(server, "org/talks", tmp_path).branch == CONVERTED
    error = refusal(server, "org/talks:it", tmp_path)
    assert error.what == "org/talks has no config 'it'"


def test_half_a_conversion_is_told_of(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {})
    server.add_branch("datasets/org/talks", CONVERTED, {"default/partial-train/0000.parquet": parquet("a")})
    listener = Listener()
    assert fetch(server, "org/talks", tmp_path, listener).split == "train"
    (told,) = (event for event in listener.events if isinstance(event, Notice))
    assert (told.level, "only the beginning" in told.text) == ("warning", True)


def test_several_configs_are_listed_with_their_sizes(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {})
    names = ("en/train", "en/test", "fr/train")
    server.add_branch("datasets/org/talks", CONVERTED, {f"{name}/0000.parquet": parquet("same") for name in names})
    error = refusal(server, "org/talks", tmp_path)
    assert isinstance(error, InvalidDataError)
    size = f"{len(parquet('same'))} B"
    assert error.why == f"en (test {size}, train {size}), fr (train {size})"
    assert error.todo == "Name one of them, for example: 'org/talks:en'"
    split = refusal(server, "org/talks:en:dev", tmp_path)
    assert (split.what, split.todo) == (
        "org/talks has no split 'dev'",
        "Name one that it has, for example: 'org/talks:en:test'",
    )
    near = refusal(server, "org/talks:fra", tmp_path)
    assert near.todo.endswith("'org/talks:fr:train'")
    assert server.downloads() == []


def test_nothing_readable_names_what_there_is(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/pictures", {"images.tar": b"x", "README.md": b"#"})
    error = refusal(server, "org/pictures", tmp_path)
    assert isinstance(error, InvalidDataError)
    assert "README.md, images.tar" in error.why


def test_a_large_table_is_refused_before_anything_is_fetched(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {"train.jsonl": b"x" * 3000, "test.jsonl": b"x" * 10})
    error = refusal(server, "org/talks", tmp_path, limit=2000)
    assert error.what == "org/talks:default:train is too large"
    assert "2.93 KiB" in error.why
    assert server.downloads() == []
    assert fetch(server, "org/talks::test", tmp_path, limit=2000).split == "test"


def test_a_full_disk_is_noticed_before(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {"train.jsonl": b"x"}, announced={"train.jsonl": 1 << 60})
    assert isinstance(refusal(server, "org/talks", tmp_path, limit=1 << 61), NoSpaceError)


def test_gated_private_and_missing_are_told_apart(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("datasets/org/gated", {"train.jsonl": b"{}"}, gated=True, accepted=False)
    server.add("datasets/org/private", {"train.jsonl": b"{}"}, private=True)
    gated = refusal(server, "org/gated", tmp_path)
    assert gated.what == "org/gated is gated"
    assert "/datasets/org/gated" in gated.todo
    for name in ("private", "missing"):
        assert refusal(server, f"org/{name}", tmp_path).what == f"org/{name} does not exist or is private"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(server, "org/private", tmp_path).split == "train"
    assert refusal(server, "org/missing", tmp_path).what == "No repository org/missing found"
    revision = refusal(server, "org/private@v9", tmp_path)
    assert (revision.what, revision.todo) == ("org/private has no revision v9", "Omit the revision: org/private")


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (Trouble(status=500), "failed to answer"),
        (Trouble(html=True), "does not answer like a hub"),
        (Trouble(get_length=3), "wrong length"),
        (Trouble(cut_after=2), "wrong length|was cut"),
    ],
    ids=["500", "captive-portal", "wrong-length", "cut"],
)
def test_trouble_leaves_nothing_that_is_believed(server: HubServer, tmp_path: Path, trouble: Trouble, said: str) -> None:
    server.add("datasets/org/talks", {"train.jsonl": b'{"text": "a"}\n'})
    server.trouble = trouble
    error = refusal(server, "org/talks", tmp_path)
    assert isinstance(error, DownloadError)
    assert any(words in error.what for words in said.split("|"))
    server.trouble = Trouble()
    with pytest.raises(DownloadError, match="not in the cache"):
        fetch(server, "org/talks", tmp_path, offline=True)
    assert fetch(server, "org/talks", tmp_path).paths[0].read_bytes() == b'{"text": "a"}\n'


def test_a_stop_ends_the_transfer(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {"train.jsonl": b"x" * (1 << 20)})
    server.trouble = Trouble(bytes_per_second=200_000)
    stop = Stop()
    done: list[str] = []

    def sink(event: Event) -> None:
        if isinstance(event, Progress):
            stop.request()
        if isinstance(event, Finished):
            done.append(event.status)

    hub = Hub(stop, sink, endpoint=server.endpoint, cache=tmp_path / "cache", offline=False)
    with pytest.raises(InterruptedRunError):
        fetch_dataset(hub, DatasetId("org/talks"))
    assert done == ["failed"]


# Offline


def test_offline_gives_what_was_fetched_whole_and_nothing_else(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {"README.md": b"#"}, card={"license": "mit"})
    files = {f"default/{split}/000{n}.parquet": parquet(f"{split} {n}") for split in ("train", "test") for n in range(2)}
    server.add_branch("datasets/org/talks", CONVERTED, files)
    fetched = fetch(server, "org/talks", tmp_path)
    server.requests.clear()
    assert fetch(server, "org/talks", tmp_path, offline=True) == fetched
    for same in ("org/talks:default", "org/talks:default:train"):
        assert fetch(server, same, tmp_path, offline=True) == fetched
    for other in ("org/talks::test", "org/talks@main", "org/talks:default:test", "org/other"):
        with pytest.raises(DownloadError) as caught:
            fetch(server, other, tmp_path, offline=True)
        assert caught.value.what == f"{other} is not in the cache"
    # A second shard that is gone, or of another length, makes the table no longer whole.
    fetched.paths[1].resolve().write_bytes(b"short")
    with pytest.raises(DownloadError, match="not in the cache"):
        fetch(server, "org/talks", tmp_path, offline=True)
    assert server.requests == []
    assert rows(fetch(server, "org/talks", tmp_path)) == ["train 0", "train 1"]


def test_a_damaged_note_vouches_for_nothing(server: HubServer, tmp_path: Path) -> None:
    server.add("datasets/org/talks", {"train.jsonl": b"{}"})
    fetch(server, "org/talks", tmp_path)
    (note,) = (tmp_path / "cache").rglob(".imatrix-runner/*.json")
    note.write_bytes(note.read_bytes()[:40])
    with pytest.raises(DownloadError, match="not in the cache"):
        fetch(server, "org/talks", tmp_path, offline=True)
    fetch(server, "org/talks", tmp_path)
    assert fetch(server, "org/talks", tmp_path, offline=True).split == "train"
