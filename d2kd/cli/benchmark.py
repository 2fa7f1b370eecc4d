"""Measures what distillation costs: a plain step, the teacher and a distillation step side by side.

Weights and images are random. Prints c/a and c/(a+b), where a is the plain student's step, b the
forward of the teacher as its file has it, as far as the methods need it, c the distillation step,
whose teacher is rebuilt for speed; medians over rounds in which they alternate, and half the
distance of the quartiles. c/(a+b) in FLOPs, of convolutions and matrix products, says how much of
it the method's own networks come to. The memory is that of tensors that a and c add, at their peak,
to the model and the state of the optimizer. On a GPU, it is counted how often the host waits for
it. On Linux the process keeps the memory that it frees, as a GPU's allocator does.

examples:
  d2kd benchmark shapes/crosskd/fcos_tiny.yaml --size 128 --ops 5 MODEL.DEVICE cpu
  d2kd benchmark frs/retinanet_R_50_R_101-1x_2x.yaml --beside "SOLVER.CHANNELS_LAST True"
  d2kd benchmark shapes/frs/fcos_tiny.yaml --size 64 --growth "batch 1 2 4" MODEL.DEVICE cpu
"""

import argparse
import re
from typing import List

from d2kd.benchmark.costs import (
    costs_markdown,
    costs_text,
    growth_text,
    read_costs,
    write_costs,
)
from d2kd.benchmark.measuring import STANDARD, Case, Costs, Load, measure
from d2kd.errors import UserError
from d2kd.writing import atomic_write, refuse_no_folder

from .arguments import add_device, until_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    load = Load()
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG ... KEY VALUE ...",
        help="recipes or files, then changes to them; without any, the recipes of docs/speed.md",
    )
    for name, default, help in (
        ("size", load.size, "height and width of the images"),
        ("batch", load.batch, "images"),
        ("boxes", load.boxes, "objects per image"),
        ("rounds", load.rounds, "timings of each part"),
        ("ops", 0, "show this many of torch's operations in which c spends its additional time"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help}; default: {default}"
        )
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="'KEY VALUE ...'",
        help="measure c with these changes too, in the same rounds; may be given several times",
    )
    parser.add_argument(
        "--growth",
        metavar="'WHAT N N ...'",
        help="measure at several values of size, batch, boxes or a config key",
    )
    parser.add_argument(
        "--json", default="", metavar="FILE", help="append to this; what is in it is not repeated"
    )
    parser.add_argument("--markdown", default="", metavar="FILE", help="write the table of recipes")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    recipes, opts = until_key(args.words)
    if args.device:
        opts += ["MODEL.DEVICE", args.device]
    cases = [Case(recipe) for recipe in recipes] or STANDARD
    cases = [case._replace(opts=(*case.opts, *opts)) for case in cases]
    for name in ("size", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: give 1 or more")
    if args.boxes < 0:
        raise UserError(f"--boxes is {args.boxes}: give 0 or more")
    for option in ("json", "markdown"):
        refuse_no_folder(getattr(args, option), f"--{option}")
    load = Load(args.size, args.batch, args.boxes, args.rounds, args.amp)
    if args.growth:
        for case in cases:
            print(_growth(case, load, args.growth.split()))
        return
    beside = [text.split() for text in args.beside]
    done = read_costs(args.json) if args.json else []
    for case in cases:
        if not any((c.case, c.load) == (case, load) for c in done):
            costs = measure(case, load, beside, operations=args.ops > 0)
            print(costs_text(costs, args.ops), flush=True)
            done.append(costs)
            if args.json:
                write_costs(done, args.json)
    if args.markdown:
        with atomic_write(args.markdown) as f:
            f.write(costs_markdown(done) + "\n")


def _growth(case: Case, load: Load, growth: List[str]) -> str:
    key, values = "".join(growth[:1]), growth[1:]
    if len(values) < 2 or key in ("rounds", "amp"):
        raise UserError("--growth: give size, batch, boxes or a config key, and two values or more")
    measured: List[Costs] = []
    for value in values:
        if key not in Load._fields:
            measured.append(measure(Case(case.recipe, (*case.opts, key, value)), load))
        elif re.fullmatch("[1-9][0-9]{0,8}", value):
            measured.append(measure(case, load._replace(**{key: int(value)})))
        else:
            raise UserError(f"--growth {key}: '{value:.20}' is no whole number above 0")
    return f"{case.recipe}\n{growth_text(key, values, measured)}"
