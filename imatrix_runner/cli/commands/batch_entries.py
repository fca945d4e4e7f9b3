"""Entries of a list as requests of ``run``: their options are read as if they had been typed after its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import click

from imatrix_runner.batch.batch_list import BatchEntry, OptionText, as_bool
from imatrix_runner.cli.commands.run import RunOptions, run, run_request
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import fill
from imatrix_runner.cli.options import SpreadingOptions
from imatrix_runner.cli.settings import Setting
from imatrix_runner.context.requests import RunRequest
from imatrix_runner.errors import RunnerError, UsageError
from imatrix_runner.models.model import model_name
from imatrix_runner.safe_text import shown

_NOT_LISTED = ("work_dir", "llama_cpp", "publish", *(each.name for each in fields(SpreadingOptions)))
"""Settings of ``run`` that are not options of an entry: one is for all models, one would run programs that came with a list,
a list spells the third itself, and the others are given with ``batch run``: they say which machines compute."""


def known_options() -> frozenset[str]:
    """The options of ``run`` that an entry may give, by the names of their settings, with underscores."""
    return frozenset(each.name or "" for each in run.params if isinstance(each, Setting)) - {*_NOT_LISTED}


def request_of(entry: BatchEntry) -> RunRequest:
    """The request of ``run`` that an entry makes, with the command that would make it. Raises :class:`UsageError` where
    ``run`` would refuse the options."""
    words = [word for name, value in entry.options.items() for word in _words(name, value, entry)]
    invocation = Invocation(("run", entry.model, *words), ())
    if entry.publish:
        words.append(f"--publish={entry.repository(model_name(entry.model))}")
    try:
        with run.make_context("run", [*words, "--", entry.model], obj=invocation) as ctx:
            return run_request(invocation, fill(RunOptions, ctx.params))
    except click.ClickException as error:
        raise UsageError(
            f"{shown(entry.model)}: {error.format_message().rstrip('.')}",
            f"{entry.where} gives an option that run does not accept",
            "Correct the value, or see: imatrix-runner run --help",
        ) from error
    except RunnerError as error:
        raise type(error)(f"{shown(entry.model)}: {error.what}", f"{error.why} ({entry.where})", error.todo) from error


def _words(name: str, value: OptionText, entry: BatchEntry) -> Iterator[str]:
    """An option as it would be typed."""
    option = next(each for each in run.params if each.name == name)
    assert isinstance(option, click.Option)
    spelling = max(option.opts, key=len)
    if option.is_flag:
        wanted = as_bool(value) if isinstance(value, str) else None
        if wanted is None:
            raise UsageError(
                f"The key {name.replace('_', '-')!r} is true or false",
                f"{entry.where} gives it {shown(repr(value), 100)}",
                "Write true or false.",
            )
        if wanted:
            yield spelling
        elif option.secondary_opts:
            yield option.secondary_opts[0]
        return
    values = value if isinstance(value, tuple) else (value,)
    if not option.multiple:
        values = (",".join(values),)
    for each in values:
        yield spelling if option.flag_value is not None and as_bool(each) else f"{spelling}={each}"
