"""Completion for shells: a script made of the parser, so that it knows every command and option there is."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_collage() {{
    local word path=""
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$path/$word" in
            {paths}) path="$path/$word" ;;
        esac
    done
    local known=""
    case "$path" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$known" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _collage collage
"""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """What the shell is to read: `eval "$(collage completion bash)"`, `collage completion fish | source`."""
    commands = dict(_walk(parser, ()))
    if shell == "fish":
        return "".join(
            line
            for path, each in commands.items()
            for line in _fish(path, each, set(_children(each)))
        )
    paths = "|".join(f"/{'/'.join(path)}" for path in commands if path)
    cases = "\n".join(
        f"        {'/' + '/'.join(path) if path else repr('')}) known='{' '.join(_words(each))}' ;;"
        for path, each in commands.items()
    )
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return head + _BASH.format(paths=paths, cases=cases)


def _walk(
    parser: argparse.ArgumentParser, path: tuple[str, ...]
) -> list[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command with the words that lead to it."""
    found = [(path, parser)]
    for name, child in _children(parser).items():
        found += _walk(child, (*path, name))
    return found


def _children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """What may stand next: commands, options, and the values of an argument that has few."""
    choices = [
        str(choice)
        for action in parser._actions
        if not action.option_strings and action.choices
        for choice in action.choices
    ]
    return choices + [
        option
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    ]


def _fish(path: tuple[str, ...], parser: argparse.ArgumentParser, children: set[str]) -> list[str]:
    inside = [f"__fish_seen_subcommand_from {name}" for name in path]
    if children:
        inside.append(f"not __fish_seen_subcommand_from {' '.join(sorted(children))}")
    where = f" -n '{'; and '.join(inside)}'" if inside else ""
    return [
        f"complete -c collage{where} "
        + (f"-l {word[2:]}" if word.startswith("--") else f"-f -a {word}")
        + "\n"
        for word in _words(parser)
    ]
