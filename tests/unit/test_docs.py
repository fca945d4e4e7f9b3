"""The documents: links lead somewhere, command lines parse, files that are named exist, and every room has its line."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from imatrix_runner.cli.commands.batch_group import RunByDefault
from imatrix_runner.cli.main import cli
from imatrix_runner.documents.manifest import Manifest
from imatrix_runner.engines.files.kernel_proofs import Proofs
from imatrix_runner.engines.files.ledger import LedgerHead
from imatrix_runner.engines.files.token_scores import TOKEN
from imatrix_runner.engines.measures import Completion
from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.files import Stamp
from imatrix_runner.imatrix import checkpoint
from imatrix_runner.journal import Hashed, StepOutput, StepRecord
from imatrix_runner.toolchain.source import TESTED_VERSION
from imatrix_runner.workspace import Owner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "imatrix_runner"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]

FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
IMPORT = re.compile(r"^\s*from (imatrix_runner[\w.]*) import ([^(\n]+)$", re.MULTILINE)
ROLE = re.compile(r":(?:mod|class|func|data|attr|meth):`([^`]+)`")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)

SOURCE = re.compile(r"\b(?:tools|src|common|ggml|conversion)/[a-z/_-]+\.(?:cpp|c|h|py)\b")
"""A file of llama.cpp."""

UPSTREAM = ("ggml/", "src/", "common/", "tools/", "include/", "gguf-py/", "conversion/", "convert_hf_to_gguf.py")
"""How paths in llama.cpp's tree begin; documents name its files by their whole path."""


@dataclass(frozen=True)
class Document:
    """``text`` is without blocks of code; ``blocks`` are those."""

    name: str
    text: str
    blocks: tuple[str, ...]

    @classmethod
    def read(cls, name: str) -> Document:
        whole = (ROOT / name).read_text(encoding="utf-8")
        return cls(name, FENCE.sub("", whole), tuple(match[3] for match in FENCE.finditer(whole)))

    @property
    def spans(self) -> list[str]:
        """What stands in backticks."""
        return [" ".join(match[2].split()) for match in SPAN.finditer(self.text)]

    @property
    def links(self) -> list[str]:
        return LINK.findall(SPAN.sub("", self.text)) + re.findall(r'<img [^>]*src="([^"]+)"', self.text)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in HEADING.findall(Document.read(path.relative_to(ROOT).as_posix()).text):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).replace("`", "").lower()).replace(" ", "-")
        counted = (f"{slug}-{n}" if n else slug for n in range(len(found) + 1))
        found.add(next(anchor for anchor in counted if anchor not in found))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    broken = []
    for link in Document.read(name).links:
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        if not path.exists() or (anchor and anchor not in anchors(path.resolve())):
            broken.append(link)
    assert not broken


def test_what_the_readme_links_to_is_in_the_source_distribution() -> None:
    included = {*_pyproject()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    for name in NAMES:
        for link in Document.read(name).links:
            if "://" not in link and not link.startswith("#"):
                target = ((ROOT / name).parent / link.partition("#")[0]).resolve().relative_to(ROOT)
                assert target.parts[0] in included, f"{name} links to {target}"


# Command lines


def parse(command: click.Command, words: list[str], name: str) -> None:
    """Raise :class:`click.UsageError` for an option, a value of a fixed list or a command that does not exist.

    Nothing runs, and no value is looked at otherwise: a document's ``MODEL`` is no file.
    """
    words = command.whole(words) if isinstance(command, RunByDefault) else words
    context = click.Context(command, info_name=name, **command.context_settings)
    given, rest, _ = command.make_parser(context).parse_args(words)
    for parameter in command.params:
        if isinstance(parameter.type, click.Choice) and isinstance(value := given.get(parameter.name), str):
            for each in value.split("|"):
                parameter.type.convert(each, parameter, context)
    if not isinstance(command, click.Group):
        if rest:
            raise click.UsageError(f"{rest} is too much")
    elif rest:
        further = command.get_command(context, rest[0])
        if further is None:
            raise click.UsageError(f"there is no command {rest[0]}")
        parse(further, rest[1:], rest[0])


def command_lines(document: Document) -> Iterator[str]:
    """Every line that calls the program, without the prompt and without what is for llama.cpp."""
    lines = [line for block in document.blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *document.spans]:
        for found in re.findall(r"(?:^|[$(\s])imatrix-runner(?= |$)([^|;&)#\n]*(?:\|\w[^;&)#\n]*)?)", line):
            yield found.partition(" -- ")[0]


@pytest.mark.parametrize("name", NAMES)
def test_command_lines_parse(name: str) -> None:
    for line in command_lines(Document.read(name)):
        try:
            parse(cli, shlex.split(line), "imatrix-runner")
        except click.UsageError as error:
            pytest.fail(f"imatrix-runner{line}: {error.format_message()}")


def test_commands_without_the_programs_name_parse_in_the_readme() -> None:
    """Tables and sentences leave the name out: ``imatrix check FILE --model GGUF``."""
    names = {*cli.list_commands(click.Context(cli, **cli.context_settings))}
    lines = [span for span in Document.read("README.md").spans if span.split()[0] in names and " " in span]
    assert len(lines) > 10
    for line in lines:
        parse(cli, shlex.split(line), "imatrix-runner")


@pytest.mark.parametrize(
    "line",
    ["run MODEL --no-such-option", "no-such-command", "imatrix no-such-command", "run MODEL --engine steam", "status x y"],
)
def test_a_wrong_command_line_is_found(line: str) -> None:
    document = Document("example", "", (f"$ imatrix-runner {line}   # a comment\n",))
    (found,) = command_lines(document)
    assert shlex.split(found) == shlex.split(line)
    with pytest.raises(click.UsageError):
        parse(cli, shlex.split(found), "imatrix-runner")


# Files and modules


def exists(span: str) -> bool:
    """Whether a path in the words of a document is there: from the top, inside the package, or the end of a module's path."""
    if any((place / span).exists() or (place / f"{span}.py").exists() for place in (ROOT, PACKAGE)):
        return True
    suffix = Path(span).suffix
    places = (PACKAGE, ROOT / "tests", ROOT / "scripts", ROOT / "docs")
    files = (path.as_posix() for place in places for path in place.rglob(f"*{suffix}"))
    return bool(suffix) and any(file.endswith(f"/{span}") for file in files)


def is_path(span: str) -> bool:
    """Whether a span names a file of this project, or a folder of it."""
    if not re.fullmatch(r"[\w./-]+", span) or span.startswith(("/", ".", *UPSTREAM)):
        return False
    tops = {path.name for place in (ROOT, PACKAGE) for path in place.iterdir() if path.is_dir()}
    return span.endswith((".py", ".c", ".h", ".toml", ".md")) or ("/" in span and span.split("/")[0] in tops - {"work"})


# Names of files in a workspace or of the user that end like files of ours.
_OTHERS = {"report.md", "README.md", "imatrix-runner.toml"}


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    missing = {span for span in Document.read(name).spans if is_path(span) and not exists(span)} - _OTHERS
    assert not missing


def module_exists(dotted: str) -> bool:
    """Whether ``imatrix_runner.x.y`` is a module, or a name in one."""
    *parents, last = dotted.split(".")
    place = ROOT.joinpath(*parents)
    if (place / last).is_dir() or (place / f"{last}.py").is_file():
        return True
    module = next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)
    return module is not None and re.search(rf"\b{re.escape(last)}\b", module.read_text(encoding="utf-8")) is not None


def metadata_keys() -> set[str]:
    """Keys of our own in GGUF files, which look like modules: ``imatrix_runner.checkpoint``."""
    sources = (path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    return {key for source in sources for key in re.findall(r'"(imatrix_runner\.\w+)"', source)}


@pytest.mark.parametrize("name", NAMES)
def test_modules_that_are_named_exist(name: str) -> None:
    named = {*re.findall(r"\bimatrix_runner(?:\.\w+)+", (ROOT / name).read_text(encoding="utf-8"))} - metadata_keys()
    assert not [found for found in named if not module_exists(found)]


def test_imports_in_snippets_name_modules_that_exist() -> None:
    """Programs that tests start are strings, into which no type checker looks."""
    missing = []
    for path in (path for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py")):
        for module, names in IMPORT.findall(path.read_text(encoding="utf-8")):
            wanted = [f"{module}.{each.split(' as ')[0].strip()}" for each in names.split("#")[0].split(",")]
            missing += [f"{path.name}: {each}" for each in wanted if not module_exists(each)]
    assert not missing


# Rooms


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def rooms() -> list[str]:
    """Every folder of the package: ``engines/worker/collect/``."""
    packages = (path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py"))
    return sorted(f"{package}/" for package in packages if package != ".")


def test_every_room_and_every_module_at_the_top_has_its_line() -> None:
    named = {*Document.read("docs/architecture.md").spans}
    tops = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert not {*rooms()} - named
    assert not tops - named


def test_the_order_of_rooms_is_the_one_that_is_checked() -> None:
    """The table of rooms lists them as import-linter has them, and so does the picture."""
    contract = _pyproject()["tool"]["importlinter"]["contracts"][0]
    layers = [layer for layer in contract["layers"] if (PACKAGE / layer).is_dir()]
    table = re.findall(r"^\| `(\w+)/` \|", Document.read("docs/architecture.md").text, re.MULTILINE)
    assert table == layers
    picture = (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8")
    places = [picture.index(f">{layer}/<") for layer in layers]
    assert places == sorted(places)


# What documents say of the code


@pytest.mark.parametrize(
    "kind",
    [StepRecord, StepOutput, Stamp, Hashed, Owner, checkpoint._State, LedgerHead, LedgerEntry, Completion, Proofs, Manifest],
)
def test_every_field_of_a_format_is_described(kind: type[Any]) -> None:
    whole = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    names = kind.__struct_fields__ if issubclass(kind, msgspec.Struct) else [field.name for field in fields(kind)]
    assert not [name for name in names if not re.search(rf"[`\"]{name}[`\"]", whole)]


def test_every_field_of_a_scored_token_is_described() -> None:
    assert TOKEN.names is not None
    assert {*TOKEN.names} <= {*Document.read("docs/formats.md").spans}


def test_every_kernel_has_its_row() -> None:
    """Kernels are made by the macros KERNEL and KERNELS (with weights, and without)."""
    folder = PACKAGE / "engines" / "worker" / "quantize" / "native"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.c"))
    kernels = {*re.findall(r"^KERNELS?\((\w+)", sources, re.MULTILINE)}
    assert len(kernels) > 10
    named = {*Document.read("docs/kernels.md").spans}
    assert not {kernel for kernel in kernels if kernel.removesuffix("_unweighted") not in named}


def test_documents_are_about_the_version_that_is_tested() -> None:
    for name in ("docs/kernels.md", "docs/llama-cpp.md"):
        assert f"llama-cpp-python {TESTED_VERSION}" in Document.read(name).text.replace("**", "")


def test_every_module_that_follows_a_file_of_llama_cpp_is_listed() -> None:
    """Modules say in their docstrings and comments what they mirror: ``tools/imatrix/imatrix.cpp``."""
    named = {*Document.read("docs/llama-cpp.md").spans}
    modules = [path for pattern in ("*.py", "*.c", "*.h") for path in PACKAGE.rglob(pattern)]
    mirrors = [path for path in modules if SOURCE.search(path.read_text(encoding="utf-8"))]
    assert len(mirrors) > 30
    places = {path: path.relative_to(PACKAGE) for path in mirrors}
    assert not [str(place) for place in places.values() if not {place.as_posix(), f"{place.parent.as_posix()}/"} & named]


def references(path: Path) -> Iterator[str]:
    """What docstrings of a module refer to: ``:func:`~imatrix_runner.files.publish```."""
    return (target.lstrip("~") for target in ROLE.findall(path.read_text(encoding="utf-8")))


def refers_to_something(path: Path, target: str) -> bool:
    """By its whole name, by one relative to the folder, or as a name of the module itself or of an error."""
    if target.startswith("imatrix_runner."):
        return module_exists(target) or module_exists(target.rpartition(".")[0])  # a member of a class
    if target.startswith("."):
        return module_exists(".".join((*path.parent.relative_to(ROOT).parts, target[1:])))
    text = ROLE.sub("", path.read_text(encoding="utf-8")) + (PACKAGE / "errors.py").read_text(encoding="utf-8")
    return re.search(rf"\b{re.escape(target.split('.')[0])}\b", text) is not None


def test_references_in_docstrings_lead_somewhere() -> None:
    lost = [
        f"{path.relative_to(PACKAGE)}: {target}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for target in references(path)
        if not refers_to_something(path, target)
    ]
    assert not lost
