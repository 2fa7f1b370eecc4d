#!/usr/bin/env python
"""Writes docs/commands.md: every sub-command with an example and its options, from their parsers.

python tools/commands_page.py
python tools/commands_page.py --check

With ``--check`` nothing is written; the exit status tells whether the page is up to date.
"""

import argparse
from typing import Iterator, List

from generated import ROOT, write_or_check

from d2kd.cli.main import COMMANDS, Command, make_parser, module_of

PAGE = ROOT / "docs/commands.md"
EXAMPLES = "\nexamples:\n"

INTRODUCTION = """\
# Commands

<!-- Written by tools/commands_page.py from the parsers: change it there. -->

`d2kd`, or `python -m d2kd`. From a clone `train_net.py` is `d2kd train`, where users of Detectron2
look for it; an installed d2kd has that as `d2kd-train` too. Every command shows its help and more
examples with `--help`, and a traceback instead of one line with `--debug`.

A config is a file, a recipe by its name (`shapes/frs/fcos_tiny.yaml`, wherever you are), or a name
in Detectron2's model zoo (`COCO-Detection/retinanet_R_50_FPN_1x.yaml`); `_BASE_` in a file of your
own finds them as well. Changes to it stand at the end, KEY VALUE ..., as in Detectron2.
"""


def section(command: Command) -> str:
    """Heading, what it does, the first example, the options."""
    module = module_of(command)
    about, _, examples = (module.__doc__ or "").partition(EXAMPLES)
    parts = [f"## d2kd {command.name}", about.strip(), f"```sh\n{first_example(examples)}\n```"]
    return "\n\n".join([*parts, "\n".join(options(make_parser(command, module)))])


def first_example(examples: str) -> str:
    """The first command, over as many lines as it takes."""
    lines: List[str] = []
    for line in examples.strip().splitlines():
        lines.append(line.strip() if not lines else f"    {line.strip()}")
        if not line.endswith("\\"):
            break
    return "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table of what the command takes, those that every command has left out."""
    yield "| option | |"
    yield "|---|---|"
    for action in parser._actions:
        if action.dest in ("help", "debug"):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        metavar = action.metavar or action.dest.upper()
        words = metavar if isinstance(metavar, str) else " ".join(metavar)
        value = f" {words}" if takes_value(action) else ""
        said = [action.help] if action.help else []
        if action.choices:
            said.append(f"one of {', '.join(map(str, action.choices))}")
        yield f"| `{name}{value}` | {'; '.join(said)} |"


def takes_value(action: argparse.Action) -> bool:
    return bool(action.option_strings) and action.nargs != 0


def page() -> str:
    """The whole page."""
    return "\n\n".join([INTRODUCTION.strip(), *map(section, COMMANDS)]) + "\n"


if __name__ == "__main__":
    write_or_check(PAGE, page)
