"""Where messages go: all of them to the run's ``log.txt``, on the console what a person reads."""

import logging
import os
import re
import sys

from detectron2.utils.logger import setup_logger

from d2kd.one_line import LOGGERS

_FILE_FORMAT = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
_FILE_TIME = "%m/%d %H:%M:%S"
# What tells how far an evaluation is, every five seconds; shown are some of these
_PROGRESS = "detectron2.evaluation.evaluator"
_SECONDS_BETWEEN = 30
_OURS = "d2kd"
_WARNINGS = "py.warnings"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class PlainFormatter(logging.Formatter):
    """Leaves out colour codes, which other libraries put into their messages."""

    def format(self, record: logging.LogRecord) -> str:
        return _COLOURS.sub("", super().format(record))


class ConsoleFormatter(PlainFormatter):
    """The time and the message; warnings and errors say what they are, in red if wanted."""

    def __init__(self, colour: bool):
        super().__init__("[%(asctime)s] %(message)s", "%H:%M:%S")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        level = f"\x1b[31m{record.levelname}\x1b[0m" if self._colour else record.levelname
        return text.replace("] ", f"] {level} ", 1)


class ConsoleFilter(logging.Filter):
    """Lets through what a person reads: d2kd's messages, how far an evaluation is, and warnings."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = 0.0  # when progress was shown, in seconds

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == _WARNINGS:
            return False
        if record.name == _PROGRESS and record.levelno < logging.WARNING:
            return self._is_time(record)
        return record.name.split(".")[0] == _OURS or record.levelno >= logging.WARNING

    def _is_time(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("Inference done"):
            return False
        if record.created - self._shown < _SECONDS_BETWEEN:
            return False
        self._shown = record.created
        return True


def set_up_logs(folder: str, rank: int) -> None:
    """Sends the messages of Detectron2 and d2kd to the run's file and, those that a person reads,
    to the console.

    On the console are d2kd's messages of level INFO, warnings of everyone, and how far an
    evaluation is. Python's warnings, which are meant for programmers, are in the file only.

    Args:
        folder: of the run.
        rank: of this process; the file of another one than the first is ``log.txt.rank<rank>``,
            and it has no console.
    """
    logging.raiseExceptions = False  # a full disk is told once, not per message
    logging.captureWarnings(True)
    for name in (*LOGGERS, _WARNINGS):
        setup_logger(folder, distributed_rank=rank, color=False, name=name)
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler.formatter, PlainFormatter):
                continue  # of a run before in this process
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.INFO)
                handler.addFilter(ConsoleFilter())
                handler.setFormatter(ConsoleFormatter(colours_wanted()))
            else:
                handler.setFormatter(PlainFormatter(_FILE_FORMAT, _FILE_TIME))


def colours_wanted() -> bool:
    """Whether the console is a terminal that may be sent colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
