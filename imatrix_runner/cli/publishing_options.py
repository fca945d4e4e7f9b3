"""Options of publishing, which ``publish`` and ``run --publish`` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import click

from imatrix_runner.cli.option_fields import setting

PUBLISH = "Publish"


@dataclass(frozen=True, kw_only=True)
class PublishingOptions:
    """How a repository is made, and how published files are named."""

    SECTION: ClassVar[str] = PUBLISH

    private: bool = setting("--private", is_flag=True, help="Make the repository private, if it is made.")
    gated: Literal["auto", "manual"] | None = setting(
        "--gated", type=click.Choice(["auto", "manual"]), help="Have readers ask for access, granted at once or by hand."
    )
    licence: str = setting(
        "--licence", "--license", default="", metavar="ID", help="Licence of the card (default: the source's)."
    )
    collection: str = setting(
        "--collection", default="", metavar="OWNER/TITLE", help="Also put the repository into this collection (or its slug)."
    )
    name_template: str = setting(
        "--name-template",
        default="{model}-{level}",
        show_default=True,
        metavar="TEMPLATE",
        help="Names of published files, for example {model}-i1-{level}.",
    )
