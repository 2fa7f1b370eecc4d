"""Prints the completion of this command for a shell; needs shtab: pip install 'd2kd[completion]'.

examples:
  d2kd completion bash > d2kd.bash    # source it in ~/.bashrc
  d2kd completion zsh > _d2kd         # put it into a folder of $fpath
"""

import argparse

from d2kd.errors import UserError

from .main import COMMANDS, make_parser, module_of

try:
    import shtab
except ModuleNotFoundError:
    shtab = None

SHELLS = ("bash", "zsh", "fish")
# What stands for a file or a folder in help
_PATHS = ("CONFIG", "DIR", "FILE", "RUN")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> None:
    if shtab is None:
        raise UserError("completion needs shtab, which is missing: pip install 'd2kd[completion]'")
    print(shtab.complete(whole_parser(), args.shell))


def whole_parser() -> argparse.ArgumentParser:
    """The command with all of its sub-commands in one parser."""
    parser = argparse.ArgumentParser(prog="d2kd")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers()
    for command in COMMANDS:
        one = make_parser(command, module_of(command))
        # Both have --help: "resolve" keeps that of the sub-command
        one = commands.add_parser(
            command.name, help=command.summary, parents=[one], conflict_handler="resolve"
        )
        for action in one._actions:
            if action.metavar in _PATHS:
                action.complete = shtab.FILE
    return parser
