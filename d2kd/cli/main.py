"""The command ``d2kd``, and its sub-command ``train`` by itself as ``d2kd-train``.

Nothing that needs Detectron2 or torch is imported before a sub-command is chosen, so that help is
quick, and there even without them.
"""

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
import time
import warnings
from types import ModuleType
from typing import Iterator, List, NamedTuple, Optional, Sequence

from d2kd import __version__
from d2kd.command import use_script
from d2kd.errors import nearest
from d2kd.one_line import exit_on_user_error, exit_status


class Command(NamedTuple):
    """A sub-command."""

    name: str
    module: str  # in d2kd.cli
    summary: str


COMMANDS = (
    Command("train", "train", "train a student, with or without a teacher"),
    Command("check", "check", "find out in minutes what would fail in hours"),
    Command("eval", "evaluate", "evaluate a detector"),
    Command("list", "list", "list methods, recipes or teachers"),
    Command("explain", "explain", "explain a method, a recipe or a config key"),
    Command("predict", "predict", "run a trained student on images"),
    Command("export", "export", "write a trained student as ONNX, TorchScript or bare weights"),
    Command("analyze", "analyze", "size, speed and accuracy of a student beside its teacher"),
    Command("compare", "compare", "train configs over seeds and compare them in a table"),
    Command("report", "report", "write a page about runs: curves, AP, detections, cost"),
    Command("benchmark", "benchmark", "measure what distillation costs in time and memory"),
    Command("balance", "balance", "propose weights of the distillation terms from a short run"),
    Command("visualize", "visualize", "draw what a method looks at"),
    Command("completion", "completion", "print the completion of this command for a shell"),
)

# Seconds that other processes wait before they end, so that torchrun does not end the first one
# before it has said what is wrong
_SECONDS_TO_SPEAK = 10

# Modules without which no sub-command starts, and what is to be done
_MISSING = {
    "detectron2": "Detectron2 is not installed: 'python -m d2kd.install_detectron2' installs "
    "release 0.6 from PyPI, or install its main branch with 'pip install --no-build-isolation "
    "git+https://github.com/facebookresearch/detectron2.git'",
    "pkg_resources": "this Detectron2 needs pkg_resources, which setuptools 82 no longer has: run "
    "'pip install \"setuptools<82\"'",
}


def main(argv: Optional[Sequence[str]] = None, script: Optional[str] = None) -> None:
    """Entry point of ``d2kd``; ends the process with a status other than 0 when something is wrong.

    Args:
        argv: the words after ``d2kd``; those of this process unless given.
        script: the file that calls this, where it has imported methods or detectors from outside
            of d2kd: trainings in processes of their own are started with it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if script is not None:
        use_script(script)
    if words[:1] == ["--version"]:
        print(f"d2kd {__version__}")
        return
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit("error: the current folder is not there any more: change to another one")
    by_name = {command.name: command for command in COMMANDS}
    if words[0] not in by_name:
        sys.exit(f"error: d2kd has no command '{words[0]}': {nearest(words[0], by_name)}")
    _run(by_name[words[0]], words[1:])


def train(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of ``d2kd-train`` and ``train_net.py``: ``d2kd train``. A script of one's own
    calls :func:`main`."""
    main(["train", *(sys.argv[1:] if argv is None else argv)])


def _overview() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: d2kd COMMAND ...",
            "",
            "Distillation of object detectors in Detectron2.",
            "",
            *lines,
            "",
            "'d2kd COMMAND --help' shows its options and an example.",
        ]
    )


def _run(command: Command, words: List[str]) -> None:
    with exit_on_user_error(debug=False):  # Ctrl-C while Detectron2 and torch are imported
        module = module_of(command)
    parser = make_parser(command, module)
    with _said_once():
        args = parser.parse_intermixed_args(words)  # overrides may stand anywhere
    # How Detectron2 calls it; nothing that a user of d2kd could change
    warnings.filterwarnings("ignore", "torch.meshgrid")
    try:
        with exit_on_user_error(args.debug):
            module.run(args)
            if sys.stdout is not None:  # a process may be started without
                sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has had enough
        _print_nothing_more()
        sys.exit(exit_status(signal.SIGPIPE))
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:
            raise
        _print_nothing_more()
        sys.exit(f"error: what this command prints cannot be written: {error.strerror}")


def _print_nothing_more() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Of the processes that torchrun starts on a machine, all with the same words, the first one
    says what is wrong with these. The others end later: torchrun ends all with the first."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            yield
        except SystemExit:
            time.sleep(_SECONDS_TO_SPEAK)
            raise


def make_parser(command: Command, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of a sub-command; its help is the docstring of its module."""
    summary, _, examples = module.__doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"d2kd {command.name}",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an option that another command has would be taken for a longer one
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    return parser


def module_of(command: Command) -> ModuleType:
    """The module of a sub-command. Ends the process if it needs a Detectron2 that is not there."""
    try:
        return importlib.import_module(f"d2kd.cli.{command.module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in _MISSING:
            raise
        sys.exit(f"error: {_MISSING[missing]}")
