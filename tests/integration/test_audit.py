"""Audits against files of the real llama-quantize: what is judged is what was done to each file."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.audit.verdicts import TensorVerdict, tensor_verdict
from imatrix_runner.engines.audit_jobs import WITHOUT, AuditCandidate, AuditJob, AuditTensor, TensorFindings
from imatrix_runner.engines.embedded.bindings import LIBRARY_VARIABLE
from imatrix_runner.engines.embedded.native_build import compile_kernels
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.protocol import Audited, TensorAudited, decode_reply, encode_job
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import clean_environment
from support.in_process import CommandLine
from support.llama_tools import BareTools, digest
from support.passes import change_keys, engine_of, set_floats, write_imatrix
from support.tiny_models import write_llama_gguf

TYPES = ("Q4_K_M", "Q2_K", "IQ4_XS", "Q5_0", "Q6_K", "Q8_0", "IQ3_S", "Q3_K_M", "Q4_0", "IQ4_NL")

_SEVERAL = """
import sys
from imatrix_runner.engines.protocol import decode_job, encode
from imatrix_runner.engines.worker.audit.audit_job import audit_tensors
for line in open(sys.argv[1], encoding="utf-8"):
    audit_tensors(decode_job(line), lambda reply: print(encode(reply).decode(), flush=True))
"""


@dataclass(frozen=True)
class Tiny:
    """Two models of one shape, two matrices of the first, and levels of it: with the first matrix, the second, none."""

    model: Path
    other: Path
    matrices: tuple[Path, Path]
    folder: Path


@pytest.fixture(scope="module")
def tiny(tools: BareTools, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("audit")
    model = write_llama_gguf(folder / "tiny-BF16.gguf", layers=1)
    other = write_llama_gguf(folder / "other-BF16.gguf", layers=1, seed=3)
    matrices = (write_imatrix(folder / "a.gguf", model), write_imatrix(folder / "b.gguf", model, seed=9))
    for name in TYPES:
        tools.quantize(model, folder / f"a-{name}.gguf", name, imatrix=matrices[0])
        tools.quantize(model, folder / f"b-{name}.gguf", name, imatrix=matrices[1])
        tools.quantize(model, folder / f"none-{name}.gguf", name)
        tools.quantize(other, folder / f"other-{name}.gguf", name)
    return Tiny(model, other, matrices, folder)


def audited(toolchain: Toolchain, jobs: Sequence[AuditJob], file: Path) -> list[list[TensorFindings]]:
    """The findings of several jobs, by one worker."""
    native = compile_kernels(cache_dir(), engine_of(toolchain).bindings.digest)
    given = [replace(job, native=native if isinstance(native, Native) else None) for job in jobs]
    file.write_bytes(b"".join(encode_job(job) + b"\n" for job in given))
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SEVERAL, file],
            stdin=reading,
            env=clean_environment({LIBRARY_VARIABLE: str(toolchain.directory)}),
            capture_output=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 0, done.stderr.decode()
    found: list[list[TensorFindings]] = [[]]
    for reply in map(decode_reply, done.stdout.decode().splitlines()):
        if isinstance(reply, TensorAudited):
            found[-1].append(reply.found)
        elif isinstance(reply, Audited):
            found.append([])
    return found[:-1]


def place_of(path: Path, tensor: str) -> tuple[int, int, str]:
    """Offset, size and type of a tensor's data."""
    header = read_header(path)
    (info,) = [info for info in header.tensors if info.name == tensor]
    assert info.n_bytes is not None
    return header.data_offset + info.offset, info.n_bytes, info.type_name


def altered(path: Path, out: Path, tensor: str, places: Sequence[tuple[int, int]]) -> Path:
    """A copy whose tensor has bits turned over at ``(byte, mask)``."""
    data, begin = bytearray(path.read_bytes()), place_of(path, tensor)[0]
    for byte, mask in places:
        data[begin + byte] ^= mask
    out.write_bytes(data)
    return out


SCALE = {"Q2_K": 80, "Q6_K": 208, "Q3_K": 108}
"""Offset of the block's scale, a float16, where it is not 0."""

CODES = {
    "Q4_K": (16, 144),
    "Q5_K": (48, 176),
    "Q2_K": (16, 84),
    "Q6_K": (0, 210),
    "Q3_K": (32, 110),
    "Q4_0": (2, 18),
    "Q5_0": (6, 22),
    "Q8_0": (2, 34),
    "IQ4_NL": (2, 18),
    "IQ4_XS": (8, 136),
    "IQ3_S": (2, 110),
}
"""Offset of some codes in a block, and the block's bytes."""


def test_a_hundred_random_cases_are_all_judged_rightly(tiny: Tiny, toolchain: Toolchain, tmp_path: Path) -> None:
    """Any tensor of any type, with what may have been done to it; one process, all rows."""
    draw = random.Random(19)
    names = [tensor.name for tensor in read_header(tiny.model).tensors if len(tensor.shape) > 1]
    ways = ("a", "b", "none", "other", "bit", "codes", "infinite")
    candidates = (AuditCandidate(0), AuditCandidate(1), AuditCandidate(WITHOUT))
    jobs, expected = [], []
    for number in range(100):
        way, level, name = ways[number % len(ways)], draw.choice(TYPES), draw.choice(names)
        made = tiny.folder / f"{way if way in ('b', 'none', 'other') else 'a'}-{level}.gguf"
        begin, size, kind = place_of(made, name)
        codes, block = CODES[kind]
        if way == "bit":
            made = altered(made, tmp_path / f"{number}.gguf", name, [(draw.randrange(size // block) * block + codes, 1)])
        elif way == "codes":  # as another version rounds: some codes in one block of a hundred are the next ones
            some = {draw.randrange(size // block) * block + codes + draw.randrange(4) for _ in range(2 + size // block // 100)}
            made = altered(made, tmp_path / f"{number}.gguf", name, [(byte, 0x11 if kind != "Q8_0" else 1) for byte in some])
        elif way == "infinite":
            at = draw.randrange(size // block) * block + SCALE.get(kind, 0)
            data = bytearray(made.read_bytes())
            data[begin + at : begin + at + 2] = b"\x00\x7c"
            made = tmp_path / f"{number}.gguf"
            made.write_bytes(data)
        ignores = kind == "Q8_0"
        verdicts: dict[str, TensorVerdict] = {
            "a": "identical",
            "b": "identical" if ignores else "another matrix",
            "none": "identical" if ignores else "identical without imatrix",
            "other": "another source",
            "bit": "damaged",
            "codes": "another quantiser",
            "infinite": "damaged",
        }
        expected.append((way, level, name, kind, verdicts[way]))
        jobs.append(
            AuditJob("audit", (tiny.model,), (made,), (AuditTensor(name, candidates),), tiny.matrices, number, None, 2, None)
        )
    found = audited(toolchain, jobs, tmp_path / "jobs")
    verdicts = [tensor_verdict(one, 0) for (one,) in found]
    wrong = [
        (case, tensor.verdict, tensor.why)
        for case, tensor in zip(expected, verdicts, strict=True)
        if case[-1] != tensor.verdict
    ]
    assert not wrong


def audit(cli: CommandLine, file: Path, source: Path, *further: str | Path, code: int = 0) -> dict[str, object]:
    ran = cli("audit", file, "--source", source, "--work-dir", file.parent / "work", *further, "--json")
    assert ran.code == code, ran.err + ran.out
    return ran.document


def test_the_matrix_is_found_by_its_name(tiny: Tiny, cli: CommandLine) -> None:
    document = audit(cli, tiny.folder / "b-Q4_K_M.gguf", tiny.model)
    assert (document["verdict"], document["imatrix"]) == ("identical", "b.gguf")


def test_a_published_matrix_in_the_hubs_cache_is_found(
    tiny: Tiny, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny-GGUF" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tiny.imatrix").write_bytes(tiny.matrices[1].read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    alone = [tmp_path / "tiny-BF16.gguf", tmp_path / "b-Q4_K_M.gguf"]
    for path in alone:
        path.write_bytes((tiny.folder / path.name).read_bytes())
    document = audit(cli, alone[1], alone[0])
    assert (document["verdict"], document["imatrix"]) == ("identical", "tiny.imatrix")
    assert [each["place"] for each in document["candidates"]] == ["cache"]  # type: ignore[attr-defined]


def test_another_matrix_than_the_given_one_is_named(tiny: Tiny, cli: CommandLine) -> None:
    document = audit(cli, tiny.folder / "b-Q4_K_M.gguf", tiny.model, "--imatrix", tiny.matrices[0], code=100)
    assert document["verdict"] == "another matrix"
    assert {tensor["imatrix"] for tensor in document["tensors"] if tensor["verdict"] == "another matrix"} == {"b.gguf"}  # type: ignore[attr-defined]


def test_a_file_without_imatrix_is_what_it_declares(tiny: Tiny, cli: CommandLine) -> None:
    document = audit(cli, tiny.folder / "none-IQ4_XS.gguf", tiny.model, "--full")
    assert (document["verdict"], document["full"]) == ("identical without imatrix", True)


def test_a_file_that_declares_an_imatrix_it_was_not_made_with(tiny: Tiny, cli: CommandLine, tmp_path: Path) -> None:
    """The metadata of one file with the tensors of another."""
    made, bare = (tiny.folder / f"{way}-Q4_K_M.gguf" for way in ("a", "none"))
    header, other = read_header(made), read_header(bare)
    out = tmp_path / "liar.gguf"
    out.write_bytes(made.read_bytes()[: header.data_offset] + bare.read_bytes()[other.data_offset :])
    assert audit(cli, out, tiny.model, code=100)["verdict"] == "identical without imatrix"


def test_another_source_is_told_from_another_quantiser(tiny: Tiny, cli: CommandLine) -> None:
    document = audit(cli, tiny.folder / "other-Q4_K_M.gguf", tiny.model, code=6)
    assert document["verdict"] == "another source"


def test_a_changed_norm_is_another_source(tiny: Tiny, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "changed.gguf"
    out.write_bytes((tiny.folder / "none-Q4_K_M.gguf").read_bytes())
    set_floats(out, "blk.0.attn_norm.weight", [2.0, 3.0])
    document = audit(cli, out, tiny.model, code=6)
    assert document["verdict"] == "another source"
    assert document["counts"]["another source"] == 1  # type: ignore[index]


def test_changed_metadata_is_named(tiny: Tiny, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "changed.gguf"
    out.write_bytes((tiny.folder / "none-Q4_K_M.gguf").read_bytes())
    change_keys(out, without=["llama.rope.freq_base", "tokenizer.ggml.add_bos_token"])
    document = audit(cli, out, tiny.model, code=100)
    assert document["verdict"] == "identical without imatrix"
    assert {finding["kind"] for finding in document["metadata"]} >= {"tokenizer"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("quantised source", "already quantised"),
        ("vocabulary", "vocabulary"),
        ("truncated", "truncated"),
        ("lying", "inconsistent"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_three_lines(
    case: str, says: str, tiny: Tiny, cli: CommandLine, tmp_path: Path
) -> None:
    file, source = tiny.folder / "none-Q4_K_M.gguf", tiny.model
    if case == "quantised source":
        source = tiny.folder / "a-Q8_0.gguf"
    elif case == "vocabulary":
        words = tmp_path / "words-BF16.gguf"
        key = b"tokenizer.ggml.tokens"
        data = bytearray(tiny.model.read_bytes())
        data[data.index(key) + len(key) + 4 + 4 + 8 + 8] ^= 1  # the first letter of the first token
        words.write_bytes(data)
        source = words
    else:
        data = bytearray(file.read_bytes())
        if case == "truncated":
            data = data[:-5000]
        else:  # a type of another size: Q4_K becomes Q6_K in the directory of tensors
            at = data.index(b"blk.0.attn_k.weight") + len(b"blk.0.attn_k.weight") + 4 + 16
            data[at] = 14
        file = tmp_path / "bad.gguf"
        file.write_bytes(data)
    ran = cli("audit", file, "--source", source)
    assert ran.code == 6
    assert says in ran.err
    assert [line.split(":")[0].strip() for line in ran.err.strip().splitlines()[-3:]] == ["Error", "Why", "Do"]


def test_a_sample_is_the_same_each_time_and_all_of_a_small_tensor(tmp_path: Path) -> None:
    from imatrix_runner.engines.worker.audit.audit_job import sampled_rows

    found = sampled_rows("a", 10_000, 256, 1 << 15, 7)
    assert found == sampled_rows("a", 10_000, 256, 1 << 15, 7) != sampled_rows("a", 10_000, 256, 1 << 15, 8)
    assert sum(map(len, found)) == 128
    assert all(one.stop <= other.start for one, other in pairwise(found))
    assert sampled_rows("a", 100, 256, 1 << 15, 7) == [range(100)]
    assert sum(map(len, sampled_rows("a", 10_000, 1 << 20, 1 << 15, 7))) == 4
    assert np.array(found[0]).max() < 10_000


def edited(path: Path, out: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    out.write_text(text.replace(old, new), encoding="utf-8")
    return out


def test_an_attestation_is_written_checked_and_not_believed_when_edited(tiny: Tiny, cli: CommandLine, tmp_path: Path) -> None:
    file, out = tiny.folder / "a-Q4_K_M.gguf", tmp_path / "a-Q4_K_M.gguf.derivation.json"
    document = audit(cli, file, tiny.model, "--attest", out)
    assert document["attestation"] == str(out)
    assert audit(cli, file, tiny.model, "--attestation", out)["proven"] is True
    for old, new in (
        ('"quantType": "Q4_K_M"', '"quantType": "Q4_K_S"'),
        (digest(tiny.matrices[0]), digest(tiny.matrices[1])),
        (digest(tiny.model), digest(tiny.other)),
        (digest(file), digest(tiny.folder / "b-Q4_K_M.gguf")),
        ('"name": "a.gguf"', '"name": "../a.gguf"'),
        (digest(file)[:8], "0" * 8),
    ):
        changed = edited(out, tmp_path / "edited.json", old, new)
        ran = cli("audit", file, "--source", tiny.model, "--attestation", changed)
        assert ran.code == 6
        assert "attestation edited.json is refused" in ran.err


def test_only_what_is_proven_is_attested(tiny: Tiny, cli: CommandLine, tmp_path: Path) -> None:
    """Not with another matrix, and not where the metadata was edited although all tensors are equal."""
    out = tmp_path / "out.json"
    given = ("--imatrix", tiny.matrices[0], "--attest", out)
    assert cli("audit", tiny.folder / "b-Q4_K_M.gguf", "--source", tiny.model, *given).code == 6
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes((tiny.folder / "none-Q4_K_M.gguf").read_bytes())
    change_keys(renamed, without=["general.name"])
    ran = cli("audit", renamed, "--source", tiny.model, "--attest", out)
    assert ran.code == 6
    assert "metadata is not" in ran.err
    assert not out.exists()
