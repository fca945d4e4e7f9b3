"""What is there, missing and in the way; whose commits count; how errors of a hub are told. Without a hub."""

from __future__ import annotations

from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from imatrix_runner.errors import InterruptedRunError, UploadError
from imatrix_runner.events import Event, Progress, ignore
from imatrix_runner.models.hub import RemoteCommit, RemoteFile, RemoteRepository, SendMeter, git_id
from imatrix_runner.models.hub.advice import Asked
from imatrix_runner.models.hub.upload_advice import explain_upload, is_bug, passes, pause_of
from imatrix_runner.models.hub.xet_progress import _Reporter
from imatrix_runner.models.model import HubId
from imatrix_runner.publish.local_files import small_file
from imatrix_runner.publish.publish_plan import FileToPublish, description, is_same, missing, replaceable, states
from imatrix_runner.publish.published_names import same_labels
from imatrix_runner.signals import Stop

ASKED = Asked(HubId("me/Tiny-GGUF"), "https://hub.example", has_token=True, perhaps_path=False)
LARGE = FileToPublish("a.gguf", 5, "a" * 64)
CARD = small_file("README.md", b"# Card\n")
REMOTE = RemoteRepository("me/Tiny-GGUF", True, "c" * 40)


def test_a_file_is_there_by_size_and_hash() -> None:
    assert is_same(LARGE, RemoteFile("a.gguf", 5, "a" * 64))
    assert not is_same(LARGE, RemoteFile("a.gguf", 6, "a" * 64))
    assert not is_same(LARGE, RemoteFile("a.gguf", 5, "b" * 64))
    assert not is_same(LARGE, RemoteFile("a.gguf", 5, git_id="a" * 40)), "without its own id of git it cannot be told"
    assert is_same(CARD, RemoteFile("README.md", 7, git_id=git_id(b"# Card\n")))
    assert not is_same(CARD, None)


def test_states_of_files() -> None:
    remote = REMOTE.after("d" * 40, [RemoteFile("a.gguf", 5, "a" * 64), RemoteFile("README.md", 1, git_id="e" * 40)])
    other = FileToPublish("b.gguf", 1, "b" * 64)
    files = (LARGE, CARD, other)
    assert states(files, remote, {"README.md"}) == {"a.gguf": "there", "README.md": "replace", "b.gguf": "missing"}
    assert states(files, remote, ())["README.md"] == "in-the-way"
    assert missing(files, remote) == (CARD, other)


def test_only_commits_that_say_so_were_made_here() -> None:
    here = RemoteCommit("1" * 40, "Upload Q4_0", description("0.1", "Q4_0"))
    quoted = RemoteCommit("2" * 40, "Revert", "This reverts: Published-by: imatrix-runner")
    last = {"a": here.commit, "b": quoted.commit, "c": "3" * 40}
    assert replaceable(last, last, [quoted, here]) == {"a"}
    assert here.message == description("0.1", "Q4_0"), "no time, no place"


def test_other_files_of_a_label_are_found() -> None:
    there = ["tiny-Q4_0.gguf", "old-Q4_0.gguf", "Q8_0/old-Q8_0-00001-of-00002.gguf", "imatrix-Q4_0.gguf", "README.md"]
    assert list(same_labels(["tiny-Q4_0.gguf"], there)) == [("tiny-Q4_0.gguf", "old-Q4_0.gguf")]
    shards = [f"t-Q4_0/t-Q4_0-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert list(same_labels(shards[:1], shards)) == []


def answer(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("PUT", "https://storage.example/x?signature=s3cr3t")
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return HfHubHTTPError(f"{status} for {request.url}", response=httpx2.Response(status, headers=names, request=request))


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 413, 429, 400, 500, 503, 418])
def test_every_status_is_told_in_three_lines_without_the_address(status: int) -> None:
    error = explain_upload(answer(status, x_error_message="the hub says why"), ASKED)
    assert isinstance(error, UploadError)
    assert error.what
    assert error.why
    assert error.todo
    assert "s3cr3t" not in error.sentence()


def test_what_passes_and_for_how_long() -> None:
    assert passes(answer(503))
    assert passes(answer(412))
    assert not passes(answer(403))
    assert passes(answer(429, retry_after="300"))
    assert pause_of(answer(429, retry_after="300")) == 300
    assert not passes(answer(429, retry_after="3600"))
    assert passes(httpx2.ReadError("cut"))
    assert not passes(httpx2.ProxyError("no"))
    assert not passes(InterruptedRunError("a", "b", "c"))
    wrapped = RuntimeError("Error while uploading 'x' to the Hub.")
    wrapped.__cause__ = answer(500)
    assert passes(wrapped)


def test_errors_of_xet_pass_and_show_no_signature() -> None:
    error = ConnectionError("no answer from https://cas.example/x?X-Amz-Signature=s3cr3t")
    assert passes(error)
    assert "s3cr3t" not in explain_upload(error, ASKED).sentence()


def test_a_gated_repository_is_not_a_missing_one() -> None:
    response = answer(403).response
    assert explain_upload(GatedRepoError("gated", response=response), ASKED).what == "me/Tiny-GGUF is gated"


def test_an_error_of_this_program_is_not_blamed_on_the_hub() -> None:
    def raised(work: object) -> BaseException:
        try:
            assert callable(work)
            work()
        except Exception as error:  # noqa: BLE001 - any
            return error
        raise AssertionError

    assert is_bug(raised(lambda: missing(None, REMOTE)))  # type: ignore[arg-type]
    assert not is_bug(raised(lambda: httpx2.URL(7)))  # type: ignore[arg-type]


def test_bytes_that_are_sent_again_count_once() -> None:
    seen: list[Event] = []
    meter = SendMeter(seen.append, Stop(), ASKED, "publish", 100)
    meter.add("a", 60)
    meter.begin("a")
    meter.add("a", 10)
    meter.add("b", 20)
    progress = [event.done for event in seen if isinstance(event, Progress)]
    assert progress == [60, 0, 10, 30]


def test_a_stop_ends_sending() -> None:
    stop = Stop()
    meter = SendMeter(ignore, stop, ASKED, "publish", 100)
    stop.request()
    with pytest.raises(InterruptedRunError):
        meter.add("a", 1)
    with pytest.raises(InterruptedRunError):
        meter.check()


def test_uploads_through_xet_count_too() -> None:
    seen: list[Event] = []
    reporter = _Reporter(SendMeter(seen.append, Stop(), ASKED, "publish", 100))
    for done in (10, 40, 40, 100):
        reporter.update_progress(SimpleNamespace(total_bytes_completed=done), {})
    reporter.close()
    assert isinstance(seen[-1], Progress)
    assert seen[-1].done == 100
