"""Builds the metadata block of a model card, which the hub displays, filters by and validates.

The hub accepts only known values (``POST /api/validate-yaml``): licences of its list, ISO 639 languages in lower case, valid
model ids. Other values of a source go to the field that the hub has for them, or are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from imatrix_runner.models.origin import repository_in
from imatrix_runner.safe_text import printable
from imatrix_runner.untrusted import split_url

LIBRARY = "gguf"
"""The library under which the hub lists GGUF repositories (https://huggingface.co/models?library=gguf)."""

# The list in the hub's answer to an unknown licence, as quoted in huggingface_hub issue 4218 (May 2026).
_LICENCES = frozenset(
    (
        *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0"),
        *("bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause"),
        *("bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0"),
        *("cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0"),
        *("cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0"),
        *("cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1"),
        *("eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research"),
        *("intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0"),
        *("openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr"),
        *("deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2"),
        *("llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other"),
    )
)
# Pipelines of models for llama.cpp other than text-generation; converters put the source's pipeline among its tags.
_PIPELINES = ("image-text-to-text", "any-to-any", "feature-extraction", "sentence-similarity", "text-ranking")
# Tags about how the source's weights are stored or loaded, which do not apply to GGUF files.
_SOURCE_ONLY = frozenset(("text-generation", "transformers", "safetensors", "pytorch"))
_LANGUAGE = re.compile(r"(code|multilingual|[a-z]{2,3})(?:[-_].*)?", re.DOTALL)
_ORDER = (
    *("base_model", "base_model_relation", "model_name", "quantized_by", "library_name", "pipeline_tag"),
    *("license", "license_name", "license_link", "language", "tags"),
)
_MAX_BLOCK = 64 << 10
_ANCHOR = re.compile(r"(?:^|[\s\[,{:-])[&*][A-Za-z0-9_]")
_MAX_TEXT, _MAX_LINK, _MAX_TAGS, _MAX_LANGUAGES = 200, 1000, 40, 200


@dataclass(frozen=True)
class CardFacts:
    """Facts about the files and their source; empty if unknown. ``repo``: the source's hub id; with the ``relation``
    ``finetune``, that of the model from which the source was fine-tuned.

    ``license_link``: an address, or a file of ``repo``. ``own_tags``: of these files; ``tags``: of the source.
    """

    model_name: str
    repo: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    own_tags: tuple[str, ...] = ()
    quantized_by: str = ""
    relation: str = "quantized"


def front_matter(facts: CardFacts) -> str:
    """The block between ``---`` lines at the beginning of the card, with its last line break."""
    from huggingface_hub.repocard_data import ModelCardData

    base = repository_in(facts.repo)
    licence, name, link = _licence(facts)
    tags = [tag for tag in _plain(facts.tags, _MAX_TAGS) if ":" not in tag]  # the hub itself adds tags such as a:b
    data = ModelCardData(
        base_model=base,
        base_model_relation=facts.relation if base else None,
        model_name=_text(facts.model_name) or None,
        quantized_by=_text(facts.quantized_by) or None,
        library_name=LIBRARY,
        pipeline_tag=next((pipeline for pipeline in _PIPELINES if pipeline in tags), "text-generation"),
        license=licence,
        license_name=name,
        license_link=link,
        language=_languages(facts.languages) or None,
        tags=[*facts.own_tags, *(tag for tag in tags if tag.lower() not in _SOURCE_ONLY and tag not in _PIPELINES)],
    )
    return f"---\n{data.to_yaml(line_break=chr(10), original_order=list(_ORDER))}\n---\n"


def card_flaw(card: str) -> str:
    """Why the hub's library cannot read the metadata of a card, as a clause that begins with "it"; empty if it can.

    The card may be anybody's: the size of its metadata is bounded, and anchors are refused: a few lines can mean gigabytes.
    """
    from huggingface_hub import ModelCard

    begin, _, rest = card.partition("\n")
    block = rest.partition("\n---")[0] if begin.rstrip() == "---" else ""
    if len(block) > _MAX_BLOCK:
        return f"it is longer than {_MAX_BLOCK >> 10} KiB"
    if _ANCHOR.search(block):
        return "it has YAML anchors or aliases"
    try:
        ModelCard(f"---\n{block}\n---\n")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return f"it is not what the hub expects: {_text(str(error))}"
    except Exception as error:
        if type(error).__module__.startswith("yaml"):  # a package of the library's, which is not imported here
            return f"it is not YAML: {_text(str(error))}"
        raise
    return ""


def licence_address(repo: str, link: str) -> str:
    """The web address of a licence: ``link`` itself, or that of a file of the source's repository; empty if it is neither."""
    text = _text(link, _MAX_LINK + 1)
    if len(text) > _MAX_LINK:
        return ""  # a truncated address is useless
    if _is_address(text):
        return text
    base = repository_in(repo)
    is_file = re.fullmatch(r"[\w.-]+(?:/[\w.-]+)*", text, re.ASCII) is not None and ".." not in text
    return f"https://huggingface.co/{base}/blob/main/{quote(text)}" if base and is_file else ""


def _is_address(text: str) -> bool:
    parts = split_url(text)
    return parts.scheme in ("http", "https") and bool(parts.netloc) and " " not in text


def _licence(facts: CardFacts) -> tuple[str | None, str | None, str | None]:
    """``license``, ``license_name`` and ``license_link``; a licence unknown to the hub becomes ``other``, with its name."""
    known, name = _text(facts.license).lower(), _text(facts.license_name)
    if known in _LICENCES - {"other"} or not (known or name):
        return known or None, None, None
    if not name and known != "other":
        name = re.sub(r"[^a-z0-9.]+", "-", known).strip("-")
    return "other", name or None, licence_address(facts.repo, facts.license_link) or None


def _languages(declared: Iterable[str]) -> list[str]:
    """Language codes that the hub accepts: ``zh-CN`` becomes ``zh``."""
    found = (_LANGUAGE.fullmatch(language.lower()) for language in _plain(declared, _MAX_LANGUAGES))
    return list(dict.fromkeys(match[1] for match in found if match))


def _plain(texts: Iterable[str], limit: int) -> list[str]:
    return list(dict.fromkeys(plain for text in texts if (plain := _text(text))))[:limit]


def _text(text: str, limit: int = _MAX_TEXT) -> str:
    """The text as one printable line of at most ``limit`` characters."""
    return printable(" ".join(text[: 4 * limit].split()))[:limit].strip()
