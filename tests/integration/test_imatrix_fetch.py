"""Published matrices through a real local hub: every publisher's names, every trouble, and where the file ends up."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.context.context import Context
from imatrix_runner.errors import DownloadError, InterruptedRunError, InvalidDataError, UsageError, WorkspaceLockedError
from imatrix_runner.events import Event, Notice, Progress, ignore
from imatrix_runner.files import sha256
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.imatrix.published.fetch_matrix import Obtained, Placed, fetch_published, find_published, obtain_published
from imatrix_runner.imatrix.published.find_matrix import Findings, PublishedRequest
from imatrix_runner.models.model import HubId, LocalFile, Model, open_gguf
from imatrix_runner.signals import Stop
from imatrix_runner.workspace import Workspace, hold
from support.command_line import Ran
from support.hub_server import HubServer, be_quick_and_anonymous
from support.hub_trouble import Trouble
from support.tiny_models import write_hf_directory, write_llama_gguf

TOKEN = "hf_" + "secret" * 5
BASE = "Qwen/Qwen3-0.6B"
QUANTISED = (f"base_model:{BASE}", f"base_model:quantized:{BASE}")
BARTOWSKI = "bartowski/Qwen_Qwen3-0.6B-GGUF"


@pytest.fixture(autouse=True)
def _quick_and_anonymous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_quick_and_anonymous(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says whose it is."""
    says = {"general.base_model.count": 1, "general.base_model.0.repo_url": f"https://huggingface.co/{BASE}"}
    path = tmp_path_factory.mktemp("model") / "Qwen3-0.6B-BF16.gguf"
    return write_llama_gguf(path, layers=1, metadata={**says, "general.base_model.0.name": "tiny llama"})


@pytest.fixture(scope="module")
def local(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model under the name it has on the hub."""
    says = {"general.source.repo_url": f"https://huggingface.co/{BASE}"}
    return write_llama_gguf(tmp_path_factory.mktemp("local") / "Qwen3-0.6B-BF16.gguf", layers=1, metadata=says)


@pytest.fixture(scope="module")
def matrix(local: Path) -> Matrix:
    """A matrix that fits the tiny model."""
    weights = [tensor for tensor in open_gguf(local, allow_requantize=False).tensors if len(tensor.shape) > 1]
    random = np.random.default_rng(1)
    entries = {
        tensor.name: MatrixEntry(random.random((1, tensor.shape[0])).astype(np.float32).astype(np.float64), np.array([1280]))
        for tensor in weights
        if tensor.name.startswith("blk.")
    }
    return Matrix(entries, 128, 10, ("calibration_datav3.txt",))


@pytest.fixture(scope="module")
def gguf(matrix: Matrix, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("matrix") / "m.gguf"
    write_gguf(matrix, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def dat(matrix: Matrix) -> bytes:
    return legacy(matrix)


def legacy(matrix: Matrix, dataset: str = "wiki.train.raw") -> bytes:
    """The layout that llama-imatrix wrote until 2025 (llama.cpp, common/imatrix-loader.cpp)."""
    pieces = [struct.pack("<i", len(matrix.entries))]
    for name, entry in matrix.entries.items():
        values = (entry.sums[0] / entry.counts[0] * matrix.chunk_count).astype("<f4")
        pieces += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", matrix.chunk_count, len(values))]
        pieces.append(values.tobytes())
    return b"".join([*pieces, struct.pack("<ii", matrix.chunk_count, len(dataset)), dataset.encode()])


def of_another_model(matrix: Matrix) -> bytes:
    return legacy(Matrix({f"{name}x": entry for name, entry in matrix.entries.items()}, 0, 10, ()))


def too_wide(matrix: Matrix) -> bytes:
    wide = {name: MatrixEntry(np.tile(entry.sums, 2), entry.counts) for name, entry in matrix.entries.items()}
    return legacy(Matrix(wide, 0, 10, ()))


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def told(self) -> str:
        return "\n".join(event.text for event in self.events if isinstance(event, Notice))


def find(model: str | Path = BASE, listener: Listener | None = None, **more: object) -> Findings:
    return find_published(PublishedRequest(str(model), **more), Context(listener or ignore))  # type: ignore[arg-type]


def fetch(model: str | Path = BASE, listener: Listener | None = None, stop: Stop | None = None, **more: object) -> Placed:
    context = Context(listener or ignore, stop or Stop())
    return fetch_published(PublishedRequest(str(model), **more), context)  # type: ignore[arg-type]


def refusal(model: str | Path = BASE, **more: object) -> DownloadError:
    """The error of a fetch that leaves nothing behind."""
    with pytest.raises(DownloadError) as caught:
        fetch(model, **more)
    error = caught.value
    assert error.exit_code == 4
    assert all((error.what, error.why, error.todo))
    assert TOKEN not in f"{error.what}{error.why}{error.todo}"
    assert not Path("work").exists()
    assert not list(Path("cache").rglob("*.incomplete"))
    return error


def placed_source(path: Path) -> dict[str, object]:
    source: dict[str, object] = json.loads(path.with_suffix(".source.json").read_text())
    return source


ERAS = [
    ("bartowski/Qwen3-0.6B-GGUF", "Qwen3-0.6B.imatrix", "dat", False),  # 2024
    (BARTOWSKI, "Qwen_Qwen3-0.6B.imatrix", "dat", True),  # 2025
    (BARTOWSKI, "Qwen_Qwen3-0.6B-imatrix.gguf", "gguf", True),  # 2026
    ("bartowski/Qwen3-0.6B-GGUF", "Qwen3-0.6B-imatrix.gguf", "gguf", True),  # 2026, sometimes
    ("mradermacher/Qwen3-0.6B-i1-GGUF", "imatrix.dat", "dat", True),
    ("mradermacher/Qwen3-0.6B-i1-GGUF", "Qwen3-0.6B.imatrix.gguf", "gguf", True),
    ("unsloth/Qwen3-0.6B-GGUF", "imatrix_unsloth.dat", "dat", True),
    ("unsloth/Qwen3-0.6B-GGUF", "imatrix_unsloth.gguf_file", "gguf", False),
    ("unsloth/Qwen3-0.6B-GGUF", "imatrix_unsloth.gguf", "gguf", True),
    ("ubergarm/Qwen3-0.6B-GGUF", "imatrix-Qwen3-0.6B-BF16.dat", "dat", True),
    ("legraphista/Qwen3-0.6B-IMat-GGUF", "imatrix.dat", "dat", False),
    ("AesSedai/Qwen3-0.6B-GGUF", "imatrix.gguf", "gguf", True),
    ("datasets/ikawrakow/imatrix-from-wiki-train", "qwen3-0.6b.imatrix", "dat", False),
    ("someone-new/Qwen3-0.6B-quants", "deep/Qwen3-imatrix.gguf", "gguf", True),
]


@pytest.mark.parametrize(("repo", "file", "kind", "tagged"), ERAS, ids=[f"{repo}:{file}" for repo, file, _, _ in ERAS])
def test_every_publisher_and_era(
    hub: HubServer, gguf: bytes, dat: bytes, local: Path, repo: str, file: str, kind: str, tagged: bool
) -> None:
    others = {"README.md": b"#", "imatrix.dataset": b"text", "Qwen3-0.6B-Q4_K_M.gguf": b"GGUF", "other-7b.imatrix": b"x" * 99}
    content = gguf if kind == "gguf" else dat
    if not repo.startswith("datasets/"):
        del others["other-7b.imatrix"]
    held = hub.add(repo, {**others, file: content}, tags=QUANTISED if tagged else (), date="2025-05-01T10:00:00.000Z")
    (found,) = find(local).candidates
    assert (found.file, found.format, found.size, found.commit) == (file, kind, len(content), held.commit)
    assert found.date == "2025-05-01T10:00:00+00:00"
    assert found.repo == repo.removeprefix("datasets/")
    assert hub.downloads() == []
    placed = fetch(local)
    assert placed.file.path == Path.cwd() / "work" / "Qwen3-0.6B" / f"imatrix.{kind}"
    assert placed.file.path.read_bytes() == content
    assert placed_source(placed.file.path) == {
        "repo": repo.removeprefix("datasets/"),
        "repo_type": "dataset" if repo.startswith("datasets/") else "model",
        "commit": held.commit,
        "path": file,
        "size": len(content),
        "sha256": sha256(placed.file.path),
        "date": "2025-05-01T10:00:00+00:00",
        "format": kind,
        "entries": 7,
        "chunks": 10,
        "dataset": "calibration_datav3.txt" if kind == "gguf" else "wiki.train.raw",
    }
    assert hub.downloads() == [file]


def test_the_format_is_told_by_content(hub: HubServer, gguf: bytes, dat: bytes) -> None:
    hub.add(BARTOWSKI, {"Qwen_Qwen3-0.6B-imatrix.gguf": dat})
    assert find().candidates[0].format == "gguf"
    assert fetch().file.path.name == "imatrix.dat"
    (known,) = find().candidates
    assert (known.format, known.checked, known.chunks) == ("dat", True, 10)
    hub.add("mradermacher/Qwen3-0.6B-i1-GGUF", {"imatrix.dat": gguf})
    assert fetch(wanted="mradermacher", force=True).file.path.name == "imatrix.gguf"
    assert sorted(path.name for path in Path("work/Qwen3-0.6B").glob("imatrix*")) == ["imatrix.gguf", "imatrix.source.json"]


def test_ranking_over_publishers(hub: HubServer, gguf: bytes, dat: bytes) -> None:
    hub.add("zed/quants", {"a-imatrix.gguf": gguf}, tags=QUANTISED, date="2026-05-01T00:00:00.000Z")
    hub.add("unsloth/Qwen3-0.6B-GGUF", {"imatrix_unsloth.gguf": gguf, "imatrix_unsloth.dat": dat}, tags=QUANTISED)
    hub.add(BARTOWSKI, {"Qwen_Qwen3-0.6B.imatrix": dat}, tags=QUANTISED, date="2024-01-01T00:00:00.000Z")
    assert [found.publisher for found in find().candidates] == ["bartowski", "zed", "unsloth", "unsloth"]
    assert fetch().source.repo == BARTOWSKI
    assert fetch(wanted="UNSLOTH", force=True).source.path == "imatrix_unsloth.gguf"
    exact = fetch(wanted="unsloth/Qwen3-0.6B-GGUF:imatrix_unsloth.dat", force=True)
    assert exact.source.format == "dat"
    assert fetch(wanted="zed/quants", force=True).source.repo == "zed/quants"


def test_a_search_of_several_pages(hub: HubServer, gguf: bytes) -> None:
    for number in range(5):
        hub.add(f"someone{number}/Qwen3", {"x-Q4_0.gguf": b"x"}, tags=QUANTISED)
    hub.add("last/Qwen3", {"imatrix.gguf": gguf}, tags=QUANTISED)
    hub.page_size = 2
    assert find().candidates[0].repo == "last/Qwen3"
    pages = [request for request in hub.requests if request.path == "/api/models"]
    assert len(pages) == 3


def test_a_quantised_repository_leads_to_its_base(hub: HubServer, gguf: bytes) -> None:
    hub.add("unsloth/Qwen3-0.6B-GGUF", {"Qwen3-0.6B-BF16.gguf": b"x"}, tags=QUANTISED)
    hub.add(BARTOWSKI, {"imatrix.gguf": gguf}, tags=QUANTISED)
    findings = find("unsloth/Qwen3-0.6B-GGUF")
    assert findings.origin is not None
    assert findings.origin.repo == BASE
    assert findings.candidates[0].repo == BARTOWSKI


def test_a_namesake_is_refused(hub: HubServer, gguf: bytes) -> None:
    hub.add("unsloth/Qwen3-0.6B-GGUF", {"imatrix.gguf": gguf}, card={"base_model": "someone/Qwen3-0.6B"})
    assert "made from someone/Qwen3-0.6B" in refusal().why


def test_the_base_model_is_said_and_doubt_too(hub: HubServer, gguf: bytes, local: Path, tmp_path: Path) -> None:
    hub.add(BARTOWSKI, {"imatrix.gguf": gguf})
    listener = Listener()
    find(local, listener)
    assert f"Base model {BASE}, from general.source.repo_url" in listener.told
    says = {"general.base_model.count": 1, "general.base_model.0.repo_url": f"https://huggingface.co/{BASE}"}
    tuned = write_llama_gguf(tmp_path / "tuned.gguf", layers=1, metadata=says)
    find(tuned, doubtful := Listener())
    assert "may be" in doubtful.told
    assert "--base-model" in doubtful.told
    silent = write_llama_gguf(tmp_path / "silent.gguf", layers=1)
    directory = write_hf_directory(tmp_path / "Qwen3-0.6B", layers=1)
    for nameless in (silent, directory):
        with pytest.raises(UsageError, match="belongs to is unknown") as caught:
            find(nameless)
        assert "--base-model ORG/NAME" in caught.value.todo
    (directory / "README.md").write_text(f"---\nbase_model: {BASE}\n---\n")
    assert find(directory).candidates
    assert find(silent, base_model=BASE).candidates


def test_nothing_published(hub: HubServer) -> None:
    hub.add("someone/quants", {"Qwen3-imatrix-IQ1_M.gguf": b"x" * 100}, tags=QUANTISED)
    hub.add(BARTOWSKI, {"x-imatrix-Q4_K_M.gguf": b"x" * 100}, tags=QUANTISED)
    error = refusal()
    assert error.what == f"No imatrix of {BASE} is published"
    for tried in (
        "2 repositories tagged",
        "mradermacher/Qwen3-0.6B-i1-GGUF (does not exist)",
        "ikawrakow",
        "Q4_K_M in the name",
    ):
        assert tried in error.why
    assert error.todo == f"Compute one with: imatrix-runner imatrix generate {BASE}"


def test_quantised_weights_are_refused_by_size_and_content(hub: HubServer, local: Path, dat: bytes) -> None:
    weights = {"Qwen3-imatrix.gguf": local, "other-imatrix.gguf": local}
    hub.add(BARTOWSKI, weights, tags=QUANTISED, announced={"other-imatrix.gguf": 100_000_000_000})
    error = refusal()
    assert "model weights (llama)" in error.why
    assert "cannot be used" in error.what
    hub.add("ubergarm/Qwen3-0.6B-GGUF", {"imatrix.dat": dat})
    refused = {refused.file: refused.why for refused in find().refused}
    assert "model weights (llama)" in refused["Qwen3-imatrix.gguf"]  # known since it was fetched
    assert "93.13 GiB" in refused["other-imatrix.gguf"]
    assert "other-imatrix.gguf" not in hub.downloads()


def test_the_next_candidate_is_tried(hub: HubServer, local: Path, matrix: Matrix, dat: bytes) -> None:
    hub.add(BARTOWSKI, {"Qwen3-imatrix.gguf": local, "Qwen3.imatrix": too_wide(matrix)})
    hub.add("unsloth/Qwen3-0.6B-GGUF", {"imatrix_unsloth.gguf": b"<html>" * 20})
    hub.add("mradermacher/Qwen3-0.6B-i1-GGUF", {"imatrix.dat": of_another_model(matrix)}, date="2026-03-01T00:00:00.000Z")
    hub.add("legraphista/Qwen3-0.6B-IMat-GGUF", {"imatrix.dat": dat}, date="2025-03-01T00:00:00.000Z")
    hub.add("ubergarm/Qwen3-0.6B-GGUF", {"imatrix.dat": dat}, gated=True, date="2026-02-01T00:00:00.000Z")
    listener = Listener()
    placed = fetch(local, listener)
    assert placed.source.repo == "legraphista/Qwen3-0.6B-IMat-GGUF"
    reasons = "\n".join(placed.skipped)
    for said in ("model weights", "values where the model needs", "neither a GGUF", "names a tensor of this model", "is gated"):
        assert said in reasons
        assert said in listener.told
    assert len(placed.skipped) == 5


def test_none_of_several_can_be_used(hub: HubServer, local: Path, matrix: Matrix) -> None:
    hub.add(BARTOWSKI, {"a-imatrix.gguf": local, "b.imatrix": of_another_model(matrix)})
    error = refusal(local)
    assert error.what == "None of the 2 published imatrices can be used"
    assert "model weights" in error.why
    assert "none of its entries" in error.why
    assert "imatrix generate" in error.todo


def test_nan_is_refused(hub: HubServer, matrix: Matrix) -> None:
    bad = {name: MatrixEntry(entry.sums * np.nan, entry.counts) for name, entry in matrix.entries.items()}
    hub.add(BARTOWSKI, {"imatrix.dat": legacy(Matrix(bad, 0, 10, ()))})
    assert "NaN" in refusal().why


def test_a_matrix_that_lies_there_is_never_overwritten(hub: HubServer, gguf: bytes, dat: bytes) -> None:
    hub.add(BARTOWSKI, {"imatrix.gguf": gguf})
    mine = Path("work/Qwen3-0.6B/imatrix.dat")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(dat)
    with pytest.raises(InvalidDataError, match="there already") as caught:
        fetch()
    assert "--force" in caught.value.todo
    assert hub.requests == []
    assert mine.read_bytes() == dat
    placed = fetch(force=True)
    assert not mine.exists()
    assert Workspace(mine.parent.absolute(), "Qwen3-0.6B").find_imatrix() == placed.file.path


def test_another_place(hub: HubServer, gguf: bytes) -> None:
    hub.add(BARTOWSKI, {"imatrix.gguf": gguf})
    out = Path("elsewhere/mine.gguf")
    assert fetch(out=out).file.path == out.absolute()
    assert placed_source(out)["repo"] == BARTOWSKI
    assert not Path("work").exists()
    with pytest.raises(InvalidDataError, match="there already"):
        fetch(out=out)
    assert fetch(out=out, force=True).source.size == len(gguf)


def test_a_held_workspace_is_left_alone(hub: HubServer, gguf: bytes) -> None:
    hub.add(BARTOWSKI, {"imatrix.gguf": gguf})
    workspace = Workspace(Path("work/Qwen3-0.6B").absolute(), "Qwen3-0.6B")
    with hold(workspace, "another"), pytest.raises(WorkspaceLockedError):
        fetch()
    assert workspace.find_imatrix() is None


# Troubles on the way. ------------------------------------------------------------------------------------------------


@pytest.fixture
def offered(hub: HubServer, gguf: bytes) -> HubServer:
    hub.add(BARTOWSKI, {"Qwen_Qwen3-0.6B-imatrix.gguf": gguf}, tags=QUANTISED)
    return hub


def test_gated(hub: HubServer, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(BARTOWSKI, {"imatrix.gguf": gguf}, gated=True)
    error = refusal()
    assert "is gated" in error.what
    assert f"{hub.endpoint}/{BARTOWSKI}" in error.todo
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch().source.repo == BARTOWSKI


def test_a_token_that_is_not_accepted(offered: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "did not accept your token" in refusal().what


def test_a_repository_that_does_not_exist(offered: HubServer) -> None:
    error = refusal(wanted="someone/absent")
    assert "someone/absent does not exist or is private" in error.what
    assert "local path" not in error.why
    error = refusal(wanted=f"{BARTOWSKI}:absent.dat")
    assert "has no file absent.dat" in error.what
    assert "Qwen_Qwen3-0.6B-imatrix.gguf" in error.todo


def test_a_file_that_is_gone(offered: HubServer) -> None:
    offered.trouble = Trouble(gone={"Qwen_Qwen3-0.6B-imatrix.gguf"})
    assert "is missing" in refusal().what
    offered.trouble.bare_404 = True
    assert refusal().exit_code == 4


@pytest.mark.parametrize("where", ["/api/models", "/resolve/"])
def test_asked_to_slow_down(offered: HubServer, where: str) -> None:
    offered.trouble = Trouble(status=429, status_times=2, retry_after=2, status_for=where)
    assert fetch(out=Path("a.gguf")).source.repo == BARTOWSKI


@pytest.mark.parametrize("where", ["/api/models", "/resolve/", f"GET /{BARTOWSKI}/resolve/"])
def test_a_pause_too_long_to_wait_for_is_told_at_once(offered: HubServer, where: str) -> None:
    offered.trouble = Trouble(status=429, retry_after=3600, status_for=where)
    error = refusal()
    assert "limits the rate of requests" in error.what
    assert "1:00:00" in error.todo
    assert len([request for request in offered.requests if where in f"{request.method} {request.path}"]) == 1


def test_a_server_error_is_tried_again_and_then_told(offered: HubServer) -> None:
    offered.trouble = Trouble(status=500, status_times=2)
    assert fetch(out=Path("a.gguf")).source.repo == BARTOWSKI
    offered.trouble = Trouble(status=500)
    assert "HTTP status 500" in refusal().why


def test_a_silent_hub(offered: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imatrix_runner.models.hub.search.LISTING_SECONDS", 0.1)
    offered.trouble = Trouble(silence=0.4)
    assert "does not answer" in refusal().what


def test_a_crawling_download_is_given_up(offered: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imatrix_runner.models.hub.transfer._PATIENCE_SECONDS", 0.4)
    offered.trouble = Trouble(bytes_per_second=500)
    assert "sends too slowly" in refusal().what


def test_cut_in_the_middle(offered: HubServer, gguf: bytes) -> None:
    offered.trouble = Trouble(cut_after=len(gguf) // 3, cut_times=2)
    assert fetch(out=Path("a.gguf")).file.path.read_bytes() == gguf


def test_cut_for_ever(offered: HubServer) -> None:
    offered.trouble = Trouble(cut_after=100)
    assert "was cut" in refusal().what


def test_wrong_lengths(offered: HubServer, gguf: bytes) -> None:
    offered.trouble = Trouble(head_length=len(gguf) + 7)
    assert "contradictory sizes" in refusal().what
    offered.trouble = Trouble(get_length=len(gguf) + 7)
    assert "wrong length" in refusal().what
    offered.trouble = Trouble(get_length=len(gguf) - 7)
    assert refusal().exit_code == 4


def test_a_hundred_gigabytes(offered: HubServer) -> None:
    hundred = 100_000_000_000
    offered.trouble = Trouble(head_length=hundred)
    error = refusal()
    assert "too large" in error.what
    assert "Nothing was downloaded" in error.todo
    assert offered.downloads() == []
    offered.trouble = Trouble(get_length=hundred)
    assert str(hundred) in refusal().why


def test_a_web_page_instead(offered: HubServer) -> None:
    offered.trouble = Trouble(html_files=True)
    assert "HF_ENDPOINT" in refusal().todo
    offered.trouble = Trouble(html=True)
    assert "does not answer like a hub" in refusal().what


def test_no_token_travels_to_another_origin(offered: HubServer, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer() as storage:
        storage.add(BARTOWSKI, {"Qwen_Qwen3-0.6B-imatrix.gguf": gguf}, commit=offered.find(BARTOWSKI).commit)  # type: ignore[union-attr]
        offered.trouble = Trouble(redirect=storage.endpoint)
        assert fetch().file.path.read_bytes() == gguf
        assert storage.downloads() == ["Qwen_Qwen3-0.6B-imatrix.gguf"]
        assert all("authorization" not in request.headers for request in storage.requests)
        assert all(TOKEN not in str(request) for request in storage.requests)
        assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in offered.requests)
        storage.requests.clear()
        offered.trouble = Trouble(next_page=f"{storage.endpoint}/api/models?cursor=2")
        with pytest.raises(DownloadError, match="does not answer like a hub"):
            find()
        assert storage.requests == []


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal().what


@pytest.mark.parametrize("variable", [True, False])
def test_offline(offered: HubServer, gguf: bytes, monkeypatch: pytest.MonkeyPatch, variable: bool) -> None:
    offline = {} if variable else {"offline": True}
    with monkeypatch.context() as patch:
        if variable:
            patch.setenv("HF_HUB_OFFLINE", "1")
        assert "is in the cache" in refusal(**offline).what
        assert offered.requests == []
    fetch(out=Path("a.gguf"))
    offered.requests.clear()
    if variable:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find(**offline).candidates[0].checked
    assert fetch(**offline).file.path.read_bytes() == gguf
    assert offered.requests == []


def test_a_stop_is_heard(offered: HubServer) -> None:
    offered.trouble = Trouble(bytes_per_second=20_000)
    stop = Stop()

    class Stopper(Listener):
        def __call__(self, event: Event) -> None:
            if isinstance(event, Progress):
                stop.request()

    stop.request()
    with pytest.raises(InterruptedRunError):
        fetch(listener=Stopper(), stop=stop)
    assert not Path("work").exists()


# For the main job. ---------------------------------------------------------------------------------------------------


def obtain(local: Path, **more: object) -> tuple[Obtained, Workspace]:
    workspace = Workspace(Path("work/Qwen3-0.6B").absolute(), "Qwen3-0.6B")
    opened: Model = open_gguf(local, allow_requantize=False)
    with hold(workspace, "run"):
        got = obtain_published(workspace, opened, LocalFile(local), sink=ignore, stop=Stop(), **more)  # type: ignore[arg-type]
    return got, workspace


def test_run_obtains_one_or_hears_why_not(offered: HubServer, local: Path, tmp_path: Path) -> None:
    got, workspace = obtain(local, wanted="mradermacher")
    assert got.file is None
    assert isinstance(got.error, DownloadError)
    assert "No imatrix" in got.reason
    tuned = write_llama_gguf(tmp_path / "t.gguf", layers=1, metadata={"general.base_model.0.repo_url": f"https://h.co/{BASE}"})
    got, _ = obtain(tuned)
    assert isinstance(got.error, UsageError)
    assert offered.downloads() == []
    got, workspace = obtain(local)
    assert got.file is not None
    assert got.file.path == workspace.find_imatrix()
    assert got.reason == f"published by {BARTOWSKI}"
    assert read(got.file.path).describe() == got.file.describe()


def test_run_on_a_hub_id(offered: HubServer, local: Path) -> None:
    workspace = Workspace(Path("work/Qwen3-0.6B").absolute(), "Qwen3-0.6B")
    opened = open_gguf(local, allow_requantize=False)
    with hold(workspace, "run"):
        got = obtain_published(workspace, opened, HubId(BASE), sink=ignore, stop=Stop())
    assert got.placed is not None
    assert got.placed.source.repo == BARTOWSKI


# The commands. -------------------------------------------------------------------------------------------------------


def test_the_commands(offered: HubServer, runner: Callable[..., Ran], local: Path, tmp_path: Path, gguf: bytes) -> None:
    offered.add("someone/quants", {"x-imatrix-IQ2_M.gguf": b"x" * 100, "imatrix.dat": b"x" * 100}, tags=QUANTISED)
    env = {"HF_ENDPOINT": offered.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    ran = runner("imatrix", "find", local, "--json", env=env)
    assert ran.code == 0, ran.err
    document = ran.document
    assert document["schema"] == "imatrix-runner/imatrix-find"
    assert document["base_model"] == {"repo": BASE, "how": "general.source.repo_url", "sure": True}
    first = document["candidates"][0]
    assert (first["publisher"], first["file"], first["size"]) == ("bartowski", "Qwen_Qwen3-0.6B-imatrix.gguf", len(gguf))
    assert {"repo", "repo_type", "commit", "date", "format", "checked", "chunks"} <= first.keys()
    assert document["refused"][0]["why"] == "quantised weights: IQ2_M in the name"
    table = runner("imatrix", "find", BASE, env=env)
    assert table.code == 0, table.err
    for shown in ("bartowski", "Qwen_Qwen3-0.6B-imatrix.gguf", "gguf?", "2026-01-01", first["commit"][:12], "Refused"):
        assert shown in table.out
    ran = runner("imatrix", "fetch", local, "--json", env=env)
    assert ran.code == 0, ran.err
    assert ran.document["schema"] == "imatrix-runner/imatrix-fetch"
    assert ran.document["source"]["repo"] == BARTOWSKI
    assert Path(ran.document["path"]).read_bytes() == gguf
    again = runner("imatrix", "fetch", local, env=env)
    assert again.code == 6
    assert again.err.count("\n  Do:  ") == 1
    none = runner("imatrix", "fetch", "org/unknown", env=env)
    assert none.code == 4, none.err
    assert "imatrix generate org/unknown" in none.err
