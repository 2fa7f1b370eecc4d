"""Commands in the documentation: their own parsers take them, their configs are there, and the keys
at their ends exist. Those that need data or a machine that a test has not say so."""

import argparse
import contextlib
import re
import runpy
import sys
from typing import FrozenSet, Iterator, List
from unittest import mock

import pytest
from pages import ROOT, SHELL, TODAY, blocks, commands, prose, text

from d2kd.cli import main
from d2kd.comparison.rows import check_rows, read_rows
from d2kd.config import read_config
from d2kd.model_zoo import resolve_config
from d2kd.pairing import make_plan

pytestmark = pytest.mark.docs

BLOCKS = [b for page in TODAY for b in blocks(page)]
COMMANDS = [b for b in BLOCKS if b.language in SHELL]
# Written by the reader, or by a command before
READERS = re.compile(r"(output|path/to)/.*|my\w*\.yaml")
PLAIN = "shapes/baselines/fcos_tiny.yaml"
KEY = re.compile(r"[A-Z][A-Z0-9_]+(\.[A-Z0-9_]+)*")
LAZY_KEY = re.compile(r"[\w.]+=")
READ_NO_DATA = ("benchmark",)
OURS = ("d2kd", "d2kd-train", "python", "make")
FROM_THE_NETWORK = ("pip", "git", "docker")
TARGETS = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
NAMED = re.compile(r"`(d2kd|make|python) ([^\s`]+)")


class Parsed(BaseException):
    """Ends a program as soon as its parser has taken its words."""

    def __init__(self, namespace: argparse.Namespace):
        self.namespace = namespace


@contextlib.contextmanager
def parsing_only() -> Iterator[None]:
    def ending(parse):
        def parsed(*args, **kwargs):
            raise Parsed(parse(*args, **kwargs))

        return parsed

    with contextlib.ExitStack() as stack:
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, name, ending(parse)))
        yield


def start(words: List[str]) -> None:
    """Starts a program of this repository in this process."""
    if words[0] == "d2kd":
        main.main(words[1:])
    elif words[0] == "d2kd-train":
        main.train(words[1:])
    elif words[1] == "-m":
        with mock.patch.object(sys, "argv", words[2:]):
            runpy.run_module(words[2], run_name="__main__")
    else:
        with mock.patch.object(sys, "argv", words[1:]):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def parse(words: List[str]) -> argparse.Namespace:
    """What the command's own parser makes of its words."""
    with parsing_only():
        try:
            start(words)
        except Parsed as parsed:
            return parsed.namespace
        except SystemExit as status:  # what argparse refuses
            raise AssertionError(f"{words}: {status}") from None
    raise AssertionError(f"{words} has no parser")


def configs_of(args: argparse.Namespace) -> List[str]:
    """The configs that a command names."""
    values = [value if isinstance(value, list) else [value] for value in vars(args).values()]
    words = [word for value in values for word in value if isinstance(word, str)]
    return [word for word in words if word.endswith((".yaml", ".py")) and "=" not in word]


def overrides_in(words: List[str], config: str) -> List[str]:
    """The overrides of a command, wherever its parser puts them: the pairs KEY VALUE, of a Python
    config path.key=value."""
    if config.endswith(".py"):
        return [word for word in words if LAZY_KEY.match(word)]
    pairs = [words[i : i + 2] for i, word in enumerate(words) if KEY.fullmatch(word)]
    # Annotations that a command before has written are not there
    return [word for pair in pairs if not pair[-1].startswith("[{json:") for word in pair]


def needs_of(words: List[str]) -> FrozenSet[str]:
    """Checks one command of ours, and says what it needs to be run."""
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS, words
        return frozenset()
    args = parse(words)
    if getattr(args, "student", ""):
        opts = overrides_in(words, args.student)
        plan = make_plan(args.student, args.teacher, args.method, opts, args.finetune_teacher)
        args.config_file = plan.pair.base
    configs = [name for name in configs_of(args) if not READERS.fullmatch(name)]
    data = {kind for name in configs or [PLAIN] for kind in data_of(name, words)}
    on_cpu = "MODEL.DEVICE cpu" in " ".join(words)
    gpus = {"GPU"} if getattr(args, "num_gpus", 1) > 1 and not on_cpu else set()
    own = getattr(args, "train_json", None) or getattr(args, "val_json", None)
    return frozenset(gpus if own or words[1] in READ_NO_DATA else {*gpus, *data})


def data_of(name: str, words: List[str]) -> FrozenSet[str]:
    """Reads a config with the overrides of a command: the data that it is trained on."""
    path = resolve_config(name, "documentation")
    if path.endswith("_ablation.yaml"):
        return frozenset() if "shapes/" in path else frozenset({"COCO"})
    if path.startswith("docs/results/"):  # tables of the embedded data
        # Rows of annotations that a command before has written are not there
        check_rows([row for row in read_rows(path) if "DATASETS.TRAIN" not in row.opts])
        return frozenset()
    cfg = read_config(path, overrides_in(words, path))
    teacher = cfg.DISTILL.TEACHER.CONFIG
    if teacher and not READERS.fullmatch(teacher):
        resolve_config(teacher, "documentation")
    sets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    return frozenset(name.split("_")[0].upper() for name in sets) & {"COCO", "VOC"}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language not in SHELL], ids=str)
def test_commands_stand_in_blocks_of_the_shell(block):
    first = {line.split()[0] for line in block.text.splitlines() if line.strip()}
    assert not first & {*OURS, *FROM_THE_NETWORK}, f"{block}: begin it with ```sh"


@pytest.mark.parametrize("page", TODAY)
def test_commands_named_in_the_text_exist(page):
    sub_commands = {command.name for command in main.COMMANDS}
    for program, word in NAMED.findall(prose(page)):
        known = {"d2kd": sub_commands, "make": TARGETS}.get(program)
        there = word in known if known else word.startswith("-") or (ROOT / word).is_file()
        assert there, f"{page} names '{program} {word}'"


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_can_be_given(block):
    needs = set()
    for words in commands(block):
        first = next((i for i, w in enumerate(words) if w in (*OURS, *FROM_THE_NETWORK)), None)
        assert first is not None, f"{block.page}: who is {words[0]}?"
        if words[first] in OURS:
            needs |= needs_of(words[first:])
    assert needs <= block.needs, f"{block}: write <!-- needs: {', '.join(sorted(needs))} -->"
