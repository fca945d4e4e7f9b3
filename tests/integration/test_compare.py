"""``compare``: files of others against the levels of a workspace. Headers come first; what is not of the source is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo, read_header
from support.command_line import Ran
from support.evaluations import COMPUTE, Place, make_levels
from support.hub_server import HubServer
from support.in_process import CommandLine

CHUNKS = 14
REPO = "others/tiny-GGUF"
MATRIX = ("Q5_K_M", "Q3_K_S")


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Own levels, and next to them a folder of others."""
    place = make_levels(tmp_path_factory.mktemp("made"), tiny_model, tiny_text)
    others = make_levels(tmp_path_factory.mktemp("others"), tiny_model, tiny_text, levels=MATRIX)
    folder = place.work.parent / "others"
    folder.mkdir()
    for level in MATRIX:
        shutil.copy(others.workspace.level_file(level), folder / f"theirs-{level}.gguf")
    altered(folder / "theirs-Q5_K_M.gguf", folder / "zeroed-Q5_K_M.gguf", "blk.1.ffn_down.weight", zero)
    altered(folder / "theirs-Q5_K_M.gguf", folder / "norm-Q5_K_M.gguf", "output_norm.weight", zero)
    return place


def zero(data: bytearray, _header: GgufHeader, begin: int, tensor: TensorInfo) -> None:
    data[begin : begin + (tensor.n_bytes or 0)] = bytes(tensor.n_bytes or 0)


def altered(
    file: Path, to: Path, name: str, change: Callable[[bytearray, GgufHeader, int, TensorInfo], None] | None = None
) -> None:
    header, data = read_header(file), bytearray(file.read_bytes())
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    if change is not None:
        change(data, header, header.data_offset + tensor.offset, tensor)
    to.write_bytes(data)


def replaced(file: Path, to: Path, old: bytes, new: bytes) -> Path:
    """A copy with some bytes of its header replaced by as many others."""
    data = file.read_bytes()
    assert len(old) == len(new)
    assert old in data
    to.write_bytes(data.replace(old, new, 1))
    return to


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    return made.copy(tmp_path / "work")


@pytest.fixture
def others(made: Place) -> Path:
    return made.work.parent / "others"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for name, value in {"HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(name, value)
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        server.add(REPO, {f"tiny-{level}.gguf": others / f"theirs-{level}.gguf" for level in MATRIX})
        yield server


def compare(place: Place, cli: CommandLine, *words: str | Path) -> Ran:
    return cli(
        *("compare", place.model, *words, "--text", place.text, *COMPUTE, "--chunks", str(CHUNKS)),
        *("--work-dir", place.work),
    )


def test_files_are_measured_with_the_levels_and_refused_ones_do_not_stop_them(
    place: Place, others: Path, cli: CommandLine, tmp_path: Path
) -> None:
    file = others / "theirs-Q5_K_M.gguf"
    lying = tmp_path / "lying.gguf"
    lying.write_bytes(file.read_bytes()[:-1000])
    vocabulary = replaced(file, tmp_path / "vocabulary.gguf", b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz")
    other = replaced(file, tmp_path / "renamed.gguf", b"blk.1.ffn_down.weight", b"blk.9.ffn_down.weight")
    unloadable = replaced(file, tmp_path / "unloadable.gguf", b"llama.block_count", b"llama.block_kount")
    bad = (others / "norm-Q5_K_M.gguf", lying, vocabulary, other, unloadable, place.text)
    ran = compare(place, cli, file, others / "theirs-Q3_K_S.gguf", others / "zeroed-Q5_K_M.gguf", *bad, "--json")
    assert ran.code == 100
    document = ran.document
    assert set(document["failed"]) == {*map(str, bad)}
    why = {Path(place).stem: error["why"] for place, error in document["failed"].items()}
    assert why["norm-Q5_K_M"] == "its tensor output_norm.weight (F32) holds other numbers; such tensors are copied"
    assert "would end at byte" in why["lying"]
    assert why["vocabulary"] == "it has no vocabulary"
    assert "it lacks blk.1.ffn_down.weight and it has blk.9.ffn_down.weight" in why["renamed"]
    assert all(error["do"] for error in document["failed"].values())
    compared = {each["name"]: each for each in document["compared"]}
    assert list(compared) == ["theirs-Q5_K_M", "theirs-Q3_K_S", "zeroed-Q5_K_M"]
    assert all(each["equal_tensors"] >= 5 for each in compared.values())
    theirs, zeroed = compared["theirs-Q5_K_M"], compared["zeroed-Q5_K_M"]
    assert zeroed["figures"]["kld"]["value"] > theirs["figures"]["kld"]["value"]
    assert zeroed["verdict"]["outcome"] == "take ours"
    assert zeroed["verdict"]["between"] == ["Q4_K_M", "Q8_0"]
    assert theirs["imatrix"]["chunks_count"]
    assert [each["level"] for each in document["own"]] == ["IQ2_XS", "Q4_K_M", "Q8_0"]
    page = (place.root / "report.html").read_text(encoding="utf-8")
    assert "zeroed-Q5_K_M.gguf" in page
    assert "take Q4_K_M instead" in page
    assert "zeroed-Q5_K_M" not in [choice["name"] for choice in document["choices"]]
    # The figures are those of evaluate, and are kept.
    assert place.evaluate(cli, chunks=CHUNKS).code == 0
    own = {each["level"]: each["kld"]["value"] for each in document["own"]}
    assert {name: found.kld.value for name, found in place.divergences().items()} == own
    before = place.runs()
    again = compare(place, cli, file)
    assert (again.code, place.runs()) == (0, before)
    assert "theirs-Q5_K_M" in again.out
    assert "Which to take" in again.out


def test_a_repository_shows_its_headers_first_and_is_fetched_file_by_file(
    place: Place, hub: HubServer, cli: CommandLine, tmp_path: Path
) -> None:
    seen = compare(place, cli, REPO, "--dry-run")
    assert seen.code == 0, seen.err
    assert f"{REPO}:tiny-Q5_K_M.gguf" in seen.out
    assert all("range" in request.headers for request in hub.requests if "/resolve/" in request.path)
    assert not place.files()

    done = compare(place, cli, f"{REPO}:Q3_K_S", f"{REPO}:tiny-Q5_K_M.gguf", "--json")
    assert done.code == 0, done.err
    assert [each["name"] for each in done.document["compared"]] == ["tiny-Q3_K_S of others", "tiny-Q5_K_M of others"]
    assert not list(tmp_path.rglob("cache/**/*.gguf"))
    assert "fetched" not in place.files()
    asked = len(hub.requests)
    again = compare(place, cli, f"{REPO}:Q3_K_S", "--json")
    assert again.document["compared"][0]["figures"] == done.document["compared"][0]["figures"]
    assert all(
        "range" in request.headers
        for request in hub.requests[asked:]
        if request.method == "GET" and "/resolve/" in request.path
    )
    cramped = compare(place, cli, REPO, "--max-disk", "1MiB", "--dry-run", "--json")
    assert cramped.document["failed"][f"{REPO}:tiny-Q5_K_M.gguf"]["what"] == f"There is no room for {REPO}:tiny-Q5_K_M.gguf"
    assert "may be used for it and its measurement" in cramped.document["failed"][f"{REPO}:tiny-Q5_K_M.gguf"]["why"]
    kept = compare(place, cli, f"{REPO}:Q3_K_S", "--again", "--keep")
    assert kept.code == 0, kept.err
    assert len(list(tmp_path.rglob("cache/**/snapshots/*/*.gguf"))) == 1


def test_what_a_repository_does_not_have_is_said(place: Place, hub: HubServer, others: Path, cli: CommandLine) -> None:
    twice = {f"{folder}/tiny-Q5_K_M.gguf": others / "theirs-Q5_K_M.gguf" for folder in ("one", "two")}
    hub.add("others/twice-GGUF", {**twice, "tiny-Q3_K_S.gguf": others / "theirs-Q3_K_S.gguf"})
    ran = compare(place, cli, "others/twice-GGUF", f"{REPO}:Q9_K", "others/none", "--dry-run", "--json")
    assert ran.code == 100
    what = {name: error["what"] for name, error in ran.document["failed"].items()}
    assert what == {
        "others/twice-GGUF:one/tiny-Q5_K_M.gguf": "others/twice-GGUF has 2 files of the label Q5_K_M",
        "others/twice-GGUF:two/tiny-Q5_K_M.gguf": "others/twice-GGUF has 2 files of the label Q5_K_M",
        f"{REPO}:Q9_K": f"{REPO}:Q9_K has nothing to compare",
        "others/none": "others/none does not exist or is private",
    }
    assert [file["name"] for file in ran.document["plan"]["files"]] == ["tiny-Q3_K_S of others"]


def test_a_clone_has_exactly_the_types_of_the_file(place: Place, others: Path, cli: CommandLine, tmp_path: Path) -> None:
    for level in MATRIX:
        file, out = others / f"theirs-{level}.gguf", tmp_path / f"{level}.txt"
        ran = cli("compare", place.model, "--clone", file, "-o", out, "--work-dir", place.work)
        assert ran.code == 0, ran.err
        assert f"--levels {level} --tensor-type-file {out}" in ran.out
        made = cli(
            "quantize",
            place.model,
            "--levels",
            "Q8_0",
            "--tensor-type-file",
            out,
            "--work-dir",
            tmp_path / "clone",
            "--imatrix",
            "none",
        )
        assert made.code == 0, made.err
        (clone,) = (tmp_path / "clone").rglob("*Q8_0.gguf")
        assert types(clone) == types(file)
        shutil.rmtree(tmp_path / "clone")
    printed = cli("compare", place.model, "--clone", others / "theirs-Q3_K_S.gguf", "--work-dir", place.work)
    assert printed.out == (tmp_path / "Q3_K_S.txt").read_text(encoding="utf-8")
    renamed = replaced(others / "theirs-Q3_K_S.gguf", tmp_path / "r.gguf", b"blk.1.ffn_down.weight", b"blk.9.ffn_down.weight")
    ran = cli("compare", place.model, "--clone", renamed, "--work-dir", place.work)
    assert ran.code == 6
    assert "other tensors: blk.9.ffn_down.weight, which the model has not" in ran.err


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.type_name for tensor in read_header(file).tensors}


def test_nothing_and_too_much_to_compare_are_usage_errors(place: Place, cli: CommandLine) -> None:
    assert cli("compare", place.model).code == 2
    both = cli("compare", place.model, "a.gguf", "--clone", "b.gguf")
    assert both.code == 2
    assert "--clone takes no further files" in both.err
