"""``completion``: the script that makes the shell complete commands, options and level names."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, get_completion_class

from imatrix_runner.cli.help_context import PageCommand
from imatrix_runner.cli.invocation import PROGRAM
from imatrix_runner.cli.main import cli

_BASH_SCRIPT = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local words=() rest=$COMP_LINE current=0 skip=0 index word response completion type value

    # bash splits words at @, : and =, too, which names of mixes and models contain: parts that touch are joined again.
    for index in "${!COMP_WORDS[@]}"; do
        word=${COMP_WORDS[index]}
        if [[ $index -gt 0 && -n $word && $rest != [[:space:]]* ]]; then
            words[${#words[@]} - 1]+=$word
        else
            words+=("$word")
        fi
        rest=${rest#*"$word"}
        [[ $index -eq $COMP_CWORD ]] && current=$((${#words[@]} - 1))
    done
    word=${words[current]#[\\"\\']}
    skip=$((${#word} - ${#2}))  # bash replaces the last part only

    response=$(env COMP_WORDS="${words[*]}" COMP_CWORD=$current %(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read type value <<< "$completion"

        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=("${value:skip}")
            [[ $value == *[@:=] ]] && compopt -o nospace
        fi
    done

    return 0
}

%(complete_func)s_setup() {
    complete -o nosort -F %(complete_func)s %(prog_name)s
}

%(complete_func)s_setup;
"""
"""As click's own (8.3), which takes the part behind the last ``@`` or ``:`` for a word of its own."""


class _Bash(BashComplete):
    source_template = _BASH_SCRIPT


@click.command(cls=PageCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script for SHELL.

    \b
    bash:  eval "$(imatrix-runner completion bash)"     in ~/.bashrc
    zsh:   eval "$(imatrix-runner completion zsh)"      in ~/.zshrc
    fish:  imatrix-runner completion fish | source      in config.fish
    """
    maker = _Bash if shell == "bash" else get_completion_class(shell)
    assert maker is not None
    click.echo(maker(cli, {}, PROGRAM, "_IMATRIX_RUNNER_COMPLETE").source())
    return 0
