"""Arguments that several sub-commands have."""

import argparse
import itertools
import os
import re
from typing import List, Sequence, Tuple

from d2kd.errors import UserError
from d2kd.lazy import python_overrides
from d2kd.pairing import Plan, make_plan

_OVERRIDE = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*|.*=.*")  # a key of YAML, or path.key=value


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Changes to the config, at the end of a command."""
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="changes to the config, as in Detectron2: path.key=value for a Python config",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Data sets of one's own, in place of the config's."""
    group = parser.add_argument_group(
        "your own data",
        "annotations in COCO's instances format, in Pascal VOC's layout or in YOLO's, in place of "
        "the config's data",
    )
    for split in ("train", "val"):
        group.add_argument(f"--{split}-json", metavar="FILE", help="annotations")
        group.add_argument(f"--{split}-images", metavar="DIR", help="folder of the images")
        group.add_argument(
            f"--{split}-voc",
            nargs=2,
            metavar=("DIR", "SPLIT"),
            help="instead: for instance trainval",
        )
        group.add_argument(
            f"--{split}-yolo",
            nargs=2,
            metavar=("YAML", "SPLIT"),
            help=f"instead: for instance data.yaml {split}",
        )


def add_names(parser: argparse.ArgumentParser) -> None:
    """Two detectors and a method, in the place of a config file."""
    group = parser.add_argument_group("without a config file")
    named = "a recipe, a file, or a name in Detectron2's model zoo"
    group.add_argument("--student", default="", metavar="NAME", help=named)
    group.add_argument(
        "--teacher", default="", metavar="NAME", help=f"{named}; or the folder of a run"
    )
    group.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="default: one that suits the two; several by several --method",
    )
    group.add_argument(
        "--finetune-teacher",
        action="store_true",
        help="train the teacher on the student's data first, in OUTPUT_DIR/teacher",
    )


def gives_names(args: argparse.Namespace) -> bool:
    """Whether the words of :func:`add_names` are used."""
    return bool(args.student or args.teacher or args.method or args.finetune_teacher)


def plan_of(args: argparse.Namespace, opts: Sequence[str], needs_weights: bool = True) -> Plan:
    """What the words of :func:`add_names` amount to, with overrides.

    Args:
        needs_weights: see :func:`~d2kd.pairing.make_plan`.

    Raises:
        UserError: if one is missing or unknown, or no method fits.
    """
    if args.config_file:
        raise UserError(
            "--config-file does not go with --student, --teacher, --method: give the names or the "
            "file"
        )
    if not (args.student and args.teacher):
        missing = "--teacher" if args.student else "--student"
        raise UserError(f"{missing} is missing: give both detectors, or a --config-file")
    return make_plan(
        args.student, args.teacher, args.method, opts, args.finetune_teacher, needs_weights
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """How many processes work on it, on which machines."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="processes per machine, each with a GPU; on a CPU with MODEL.DEVICE cpu",
    )
    group.add_argument("--num-machines", type=int, default=1, help="machines that take part")
    group.add_argument("--machine-rank", type=int, default=0, help="0 ... number of machines - 1")
    group.add_argument(
        "--dist-url",
        default="auto",
        help="tcp://ADDRESS:PORT of the machine of rank 0, for several machines",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a trained detector runs."""
    parser.add_argument(
        "--device", default="", help="cpu, cuda or cuda:N (default: a GPU if there is one)"
    )


def until_key(words: Sequence[str]) -> Tuple[List[str], List[str]]:
    """The words before the first config key, and the overrides that begin with it."""
    first = list(itertools.takewhile(lambda word: not _begins_overrides(word), words))
    return first, list(words[len(first) :])


def _begins_overrides(word: str) -> bool:
    """A file may be named lr=0.01.yaml, as sweeps do."""
    return _OVERRIDE.fullmatch(word) is not None and not os.path.isfile(word)


def overrides_of(args: argparse.Namespace) -> List[str]:
    """The overrides that a command line amounts to, those for the data first, in the syntax of
    ``args.config_file``.

    Raises:
        UserError: if a data set is given by half.
    """
    opts: List[str] = []
    for split, key in (("train", "DATASETS.TRAIN"), ("val", "DATASETS.TEST")):
        path, images = (getattr(args, f"{split}_{part}", None) for part in ("json", "images"))
        if bool(path) != bool(images):
            given, missing = ("json", "images") if path else ("images", "json")
            raise UserError(f"--{split}-{given} is given without --{split}-{missing}: give both")
        kinds = ("json", "voc", "yolo")
        given = [f"--{split}-{x}" for x in kinds if getattr(args, f"{split}_{x}", None)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are several data sets: give one of them")
        if path:
            opts += [key, repr([{"json": path, "images": images}])]
        for kind in kinds[1:]:
            words = getattr(args, f"{split}_{kind}", None)
            if words:
                opts += [key, repr([{kind: words[0], "split": words[1]}])]
    return [*python_overrides(args.config_file, opts), *args.opts]
