"""Headers of GGUF files on a hub are read from their beginnings alone; what cannot be read is refused."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from imatrix_runner.errors import RunnerError
from imatrix_runner.events import ignore
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.hub import Hub, NamedGguf, PublishedGguf, find_ggufs, parse_named, published_ggufs, read_headers
from imatrix_runner.signals import Stop
from support.hub_server import HubServer

REPO = "them/tiny-GGUF"
NAME = "tiny-Q4_K_M.gguf"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


def hub_of(server: HubServer, folder: Path) -> Hub:
    return Hub(Stop(), ignore, server.endpoint, folder / "cache", offline=False)


def published(hub: Hub) -> PublishedGguf:
    (found,) = find_ggufs(hub, NamedGguf(REPO, file=NAME)).values()
    assert isinstance(found, PublishedGguf)
    return found


def test_a_header_longer_than_the_first_bytes_is_read_on(
    server: HubServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_ggufs, "_FIRST_BYTES", 700)
    monkeypatch.setattr(published_ggufs, "_BLOCK_BYTES", 3000)
    server.add(REPO, {NAME: tiny_model})
    hub = hub_of(server, tmp_path)
    (header,) = read_headers(hub, published(hub), tmp_path)
    local = read_header(tiny_model)
    assert (header.tensors, header.file_size, header.metadata) == (local.tensors, local.file_size, local.metadata)
    assert (tmp_path / NAME).stat().st_size < 4 * local.data_offset < local.file_size


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data[: len(data) - 100_000], "would end at byte"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 40) + data[16:], "cannot hold them"),
        (lambda data: b"<!DOCTYPE html>" + data[15:], "it is"),
        (lambda data: data[:2000], "cannot hold them|the file ends at byte|would end at byte"),
    ],
    ids=["lying", "endless", "page", "cut"],
)
def test_a_header_that_lies_is_refused(server: HubServer, tiny_model: Path, tmp_path: Path, change, why: str) -> None:  # type: ignore[no-untyped-def]
    server.add(REPO, {NAME: change(tiny_model.read_bytes())})
    hub = hub_of(server, tmp_path)
    with pytest.raises(RunnerError, match=why) as refused:
        read_headers(hub, published(hub), tmp_path)
    assert refused.value.what.startswith(f"{REPO}:{NAME}")
    assert str(tmp_path) not in str(refused.value)


def test_a_server_without_ranges_is_read_from_the_beginning_only(
    server: HubServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, {NAME: tiny_model})
    server.trouble.ranges = False
    hub = hub_of(server, tmp_path)
    (header,) = read_headers(hub, published(hub), tmp_path)
    assert header.tensors == read_header(tiny_model).tensors
    monkeypatch.setattr(published_ggufs, "_FIRST_BYTES", 700)
    with pytest.raises(RunnerError, match="cannot send a part of a file"):
        read_headers(hub, published(hub), tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a/b", NamedGguf("a/b")),
        ("a/b:Q4_K_M", NamedGguf("a/b", None, "Q4_K_M")),
        ("a/b@v1:sub/x.gguf", NamedGguf("a/b", "v1", "sub/x.gguf")),
        ("x.gguf", None),
        ("dir/x.gguf", None),
        ("../a/b", None),
        ("a/b/c", None),
    ],
)
def test_names_of_files_on_a_hub(text: str, named: NamedGguf | None) -> None:
    assert parse_named(text) == named
