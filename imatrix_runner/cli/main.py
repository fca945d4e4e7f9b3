"""The ``imatrix-runner`` command: finds the subcommand and turns every outcome into an exit code."""

from __future__ import annotations

import importlib
import io
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from imatrix_runner import __version__
from imatrix_runner.cli.help_context import HELP_OPTIONS, PageGroup, colour
from imatrix_runner.cli.invocation import PROGRAM, Invocation
from imatrix_runner.errors import InterruptedRunError, RunnerError, UsageError, from_os_error
from imatrix_runner.files import not_utf8
from imatrix_runner.untrusted import is_unicode

# name -> (module, attribute, one line of help): modules are imported only when their command runs.
_COMMANDS = {
    "run": ("run", "run", "Take a model through imatrix and quantisation to verified files."),
    "quantize": ("quantize", "quantize", "Quantise with an existing imatrix; never generates one."),
    "batch": ("batch_group", "batch", "Work through a list of models: run, add, status."),
    "advise": ("advise", "advise", "What fits this machine, what is gained by an imatrix, how long it takes."),
    "report": ("report", "report", "Make report.html, .md, .png and .json of a workspace."),
    "evaluate": ("evaluate", "evaluate", "Measure every level against its source, with and without imatrix."),
    "audit": ("audit", "audit", "Check whether a file's bytes are what llama-quantize makes of its source."),
    "compare": ("compare", "compare", "Compare GGUF files of others with the levels of a model, at equal size."),
    "rebuild": ("rebuild", "rebuild", "Make a level's file again from its recipe, with the same bytes."),
    "publish": ("publish", "publish", "Upload verified levels to a Hugging Face repository, with card and imatrix."),
    "imatrix": ("imatrix_group", "imatrix", "Importance matrices: generate, check, merge, convert, look inside."),
    "calibration": ("calibration_group", "calibration", "Calibration texts: list, build, inspect, fetch."),
    "tools": ("tools", "tools", "llama.cpp's programs: locate, build, install."),
    "doctor": ("doctor", "doctor", "Check this machine: what is there, what is missing, what to do."),
    "status": ("status", "status", "List every workspace: done, running, resumable."),
    "demo": ("demo", "demo", "Quantise the shipped demo model to 8 levels."),
    "completion": ("completion", "completion", "Print the shell's completion script."),
}
_FIRST = ("imatrix-runner doctor", "imatrix-runner run MODEL --dry-run", "imatrix-runner run MODEL")
_ALIASES = {"quantise": "quantize"}


class LazyGroup(PageGroup):
    """A group that knows its commands' names and summaries without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(_ALIASES.get(cmd_name, cmd_name))
        if entry is None:
            return None
        command = getattr(importlib.import_module(f"imatrix_runner.cli.commands.{entry[0]}"), entry[1])
        assert isinstance(command, click.Command)
        return command

    def summaries(self, ctx: click.Context) -> list[tuple[str, str]]:
        return [(name, entry[2]) for name, entry in _COMMANDS.items()]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from imatrix_runner.cli.views.help_page import write_examples

        super().format_help_text(ctx, formatter)
        write_examples(formatter, _FIRST)


@click.group(cls=LazyGroup, context_settings={"help_option_names": list(HELP_OPTIONS)})
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Importance matrices and quantised GGUF files in one command.

    MODEL is a GGUF file, a Hugging Face directory or a hub id (org/name).

    Exit codes: 0 done, 1 bug, 2 usage, 3 toolchain missing, 4 download or upload, 5 engine failed, 6 invalid input or
    output, 7 workspace locked, 8 no space, 100 some levels failed, 130 interrupted (the same command continues).
    """
    if not ctx.resilient_parsing:
        from imatrix_runner.cli.settings import apply_settings, warn_of_environment

        apply_settings(ctx)
        warn_of_environment(ctx)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that cannot be decoded
    try:
        code = run_cli(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:  # another Ctrl-C while the first is being reported
        code = InterruptedRunError.exit_code
    # The exit code is decided. Another Ctrl-C would kill the interpreter during shutdown, with a different code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # CPython remembers a KeyboardInterrupt that passed through code compiled from text (a dataclass being made during an
    # import), and at exit kills itself by SIGINT, even if it was caught. Running such code once more without error clears that.
    exec("")  # noqa: S102
    raise SystemExit(code)


def run_cli(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are printed on stderr (with ``--json`` also on stdout)."""
    # Arguments after "--" are passed to llama.cpp unread.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, invocation = arguments[:split], Invocation(tuple(arguments), tuple(arguments[split + 1 :]))
    as_json = "--json" in own
    try:
        for argument in arguments:
            if not is_unicode(argument):
                raise not_utf8(argument)
        code = cli.main(own, prog_name=PROGRAM, standalone_mode=False, obj=invocation, color=colour())
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", color=colour())
        return 0 if not own else 2
    except click.ClickException as error:
        return _report(_misused(error), invocation, as_json=as_json)
    except RunnerError as error:
        return _report(error, invocation, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        stopped = InterruptedRunError("Stopped at once", "Ctrl-C asked for it", "Run the same command again: it continues.")
        return _report(stopped, invocation, as_json=as_json)
    except SystemExit:
        return 0  # how Click ends when the reader of stdout has gone (a pager, head): not an error
    except OSError as error:
        return _report(from_os_error(error, "working on a file"), invocation, as_json=as_json)
    except Exception:  # noqa: BLE001 - the last resort: anything else is a bug of this program, and reported as one
        traceback.print_exc()
        click.echo(f"This is a bug in {PROGRAM} {__version__}: please report it with the lines above.", err=True)
        return 1


def _misused(error: click.ClickException) -> UsageError:
    """Click's error about a command line as a :class:`UsageError`."""
    ctx = getattr(error, "ctx", None)
    command = ctx.command_path if ctx is not None else PROGRAM
    usage = " ".join((command, *(ctx.command.collect_usage_pieces(ctx) if ctx is not None else ())))
    return UsageError(error.format_message().rstrip("."), f"usage: {usage}", f"See its options with: {command} --help")


def _report(error: RunnerError, invocation: Invocation, *, as_json: bool) -> int:
    todo = error.todo
    if isinstance(error, InterruptedRunError):
        todo = f"Continue with: {invocation.command}"
    if as_json:
        from imatrix_runner.cli.views.json_documents import error_document, print_document

        print_document(error_document(error, todo))
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {error.what}.", err=True, color=colour())
    click.echo(f"  Why: {_sentence(error.why)}", err=True)
    click.echo(f"  Do:  {todo}", err=True)
    return error.exit_code


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
