"""``publish``: uploads a workspace's verified files to a hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option, setting
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.publishing_options import PublishingOptions
from imatrix_runner.cli.requested import publish_request
from imatrix_runner.cli.types import FOLDER, LevelNames
from imatrix_runner.cli.work import at_work, print_result
from imatrix_runner.context.requests import EnvironmentRequest

_WHAT = "What to publish"


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    model: str = argument(metavar="MODEL|WORKSPACE")
    to: str = setting("--to", required=True, metavar="ORG/NAME", section=_WHAT, help="Repository on the hub.")
    levels: tuple[str, ...] = setting(
        "--levels", type=LevelNames(), default="", section=_WHAT, help="Levels to publish (default: all that are there)."
    )
    work_dir: Path = setting(
        "--work-dir", type=FOLDER, default=Path("work"), show_default=True, section=_WHAT, help="Where the workspaces are."
    )
    dry_run: bool = option(
        "--dry-run",
        is_flag=True,
        section=_WHAT,
        help="Only show what would be uploaded, what is there already, and what is refused.",
    )
    publishing: PublishingOptions
    talk: TalkOptions


@command(
    PublishOptions,
    examples=(
        "imatrix-runner publish org/name --to me/name-GGUF --dry-run",
        "imatrix-runner publish work/model --to me/model-GGUF",
        "imatrix-runner publish model-BF16.gguf --to me/model-GGUF --private --levels Q4_K_M,IQ3_XXS",
    ),
)
def publish(invocation: Invocation, options: PublishOptions) -> int:
    """Upload the finished levels of MODEL to a Hugging Face repository, with card, imatrix and report.

    MODEL is named as for run; or give its workspace. Only files that were verified are uploaded, each level in a commit of its
    own, and what is on the hub already is not uploaded again: after an interruption the same command continues. Files of others
    are never overwritten. Needs a token with write access (HF_TOKEN, or hf auth login).
    """
    from imatrix_runner.app.publish import publish as carry_out
    from imatrix_runner.cli.views.publish_table import print_published, publish_document

    environment = EnvironmentRequest(options.work_dir, command=invocation.command)
    request = publish_request(options.model, options.to, environment, options.publishing, options.levels)
    with at_work(options.talk) as work:
        result = carry_out(request, work.context, dry_run=options.dry_run)
    blocked = any(file.state == "in-the-way" for file in result.planned)
    code = 6 if blocked else 0
    print_result(options.talk, lambda: publish_document(result, code), lambda console: print_published(result, console))
    return code
