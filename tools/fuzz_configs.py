#!/usr/bin/env python
"""Changes shipped recipes at random and says what happens: nothing may end in a traceback of d2kd,
build a giant, or train with a loss that is not finite.

    python tools/fuzz_configs.py --count 2000 --seed 0

Every mutation sets one to three keys of a recipe of the embedded data to a wrong value: none, NaN,
infinity, 0, a negative or huge number, a number of another type, a wrong name, a list of another
length. What `d2kd check --config-only` does follows: the config is read and the pair is built with
random weights, then its optimizer, and two steps run on images of noise. Mutations run in processes
of their own, so that one that dies or hangs is an outcome like others.
"""

import argparse
import collections
import contextlib
import glob
import multiprocessing
import os
import random
import resource
import tempfile
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch
import yaml
from detectron2.config import CfgNode

import d2kd
from d2kd.check.noise import LossNotFinite, build_for_training, try_on_noise
from d2kd.config import read_config
from d2kd.distillation import save_random_teacher
from d2kd.errors import UserError
from d2kd.schema import get_value, leaves

PACKAGE = os.path.dirname(os.path.abspath(d2kd.__file__)) + os.sep
RECIPES = os.path.join(os.path.dirname(PACKAGE[:-1]), "configs", "shapes", "*", "*_tiny.yaml")
# Set by the tool itself, or without effect before training on data
KEPT = ("OUTPUT_DIR", "DISTILL.TEACHER", "DATASETS", "DATALOADER", "MODEL.DEVICE", "VERSION")
VALUES = (None, float("nan"), float("inf"), 0, -1, 0.5, -0.5, 10**9, 10**12, "", "wrong", True, [])
# A student of more numbers than this was not meant
MAX_PARAMETERS = 50e6
MAX_MEMORY = 12 * 2**30  # bytes of one process
MAX_SECONDS = 180  # for one mutation
LIBRARY = "traceback of a library"


def relevant(cfg: CfgNode) -> List[str]:
    """The keys that this recipe reads, those of its methods first and as many as all others."""
    methods = tuple(f"DISTILL.{name.upper()}." for name in cfg.DISTILL.METHODS)
    architecture = {"PaperFCOS": "FCOS", "GeneralizedRCNN": "ROI_"}
    name = architecture.get(cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE.upper())
    parts = ("META_ARCHITECTURE", "BACKBONE", "BASIC_RESNET", "RESNETS", "FPN", "PIXEL", name)
    detector = tuple(f"MODEL.{part}" for part in (*parts, "RPN", "ANCHOR_GENERATOR"))
    names = [name for name, _ in leaves(cfg) if not name.startswith(KEPT)]
    ours = [n for n in names if n.startswith(methods)] + ["DISTILL.METHODS"]
    theirs = [n for n in names if n.startswith((*detector, "SOLVER."))]
    return ours * max(1, len(theirs) // len(ours)) + theirs


def mutated(value: Any, choose: random.Random) -> Any:
    """A value that is probably wrong in place of one that is right."""
    if isinstance(value, (list, tuple)) and value and choose.random() < 0.6:
        changed = list(value)
        where = choose.randrange(len(changed))
        action = choose.choice(("drop", "repeat", "change"))
        if action == "drop":
            del changed[where]
        elif action == "repeat":
            changed.append(changed[where])
        else:
            changed[where] = choose.choice(VALUES)
        return type(value)(changed)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and choose.random() < 0.5:
        return type(value)(choose.choice((-value, 3 * value + 1, 0, 1000 * value)))
    return choose.choice(VALUES)


def write_yaml(recipe: str, changes: Dict[str, Any], path: str) -> None:
    """A config file that changes a recipe."""
    content: Dict[str, Any] = {"_BASE_": os.path.abspath(recipe)}
    for name, value in changes.items():
        node = content
        *parents, key = name.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[key] = list(value) if isinstance(value, tuple) else value
    with open(path, "w") as f:
        yaml.safe_dump(content, f)


def outcome(path: str, teacher: str) -> Tuple[str, str]:
    """What a config file comes to: a kind, and what was said."""
    try:
        cfg = read_config(path, ["DISTILL.TEACHER.WEIGHTS", teacher])
        model = build_for_training(cfg)
        parameters = sum(p.numel() for p in model.parameters())
        if parameters > MAX_PARAMETERS:
            return "giant", f"{parameters / 1e6:.0f} M parameters"
        try_on_noise(cfg, model)
    except LossNotFinite as error:
        return "not finite", str(error)
    except UserError as error:
        return "refused", str(error).split(":")[0]
    except MemoryError:
        return "giant", "out of memory"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if os.path.abspath(f.filename).startswith(PACKAGE)]
        innermost = os.path.abspath(frames[-1].filename)
        where = f"{os.path.relpath(ours[-1].filename, PACKAGE)}:{ours[-1].lineno}" if ours else ""
        kind = "traceback" if innermost.startswith(PACKAGE) else LIBRARY
        return kind, f"{where} {type(error).__name__}: {str(error).splitlines()[:1]}"
    return "trains", ""


class Mutation(NamedTuple):
    """A recipe with some keys changed. Each follows from its number and the seed alone."""

    recipe: str
    changes: Dict[str, Any]


def mutation_of(seed: int, number: int, recipes: List[str]) -> Mutation:
    """One of the mutations of a seed."""
    choose = random.Random(f"{seed}/{number}")
    recipe = choose.choice(recipes)
    cfg = read_config(recipe)
    names = [choose.choice(relevant(cfg)) for _ in range(choose.choice((1, 1, 2, 3)))]
    return Mutation(recipe, {name: mutated(get_value(cfg, name), choose) for name in names})


def work(seed: int, numbers: List[int], recipes: List[str], results: Connection) -> None:
    """What one process does: says each number when it starts on it, then what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    teachers: Dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            recipe, changes = mutation_of(seed, number, recipes)
            results.send((number, None))
            cfg = read_config(recipe)
            teacher = cfg.DISTILL.TEACHER.CONFIG
            if teacher not in teachers:
                teachers[teacher] = os.path.join(folder, f"{len(teachers)}.pth")
                torch.manual_seed(0)
                save_random_teacher(cfg, teachers[teacher])
            write_yaml(recipe, changes, os.path.join(folder, "mutation.yaml"))
            torch.manual_seed(number)
            said = outcome(os.path.join(folder, "mutation.yaml"), teachers[teacher])
            results.send((number, said))


def outcomes(seed: int, numbers: List[int], recipes: List[str]) -> Iterator[Tuple[int, str, str]]:
    """Number, kind and what was said of some mutations, in a process of their own, which may die
    or hang: then another one goes on after the mutation that it was at."""
    while numbers:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=work, args=(seed, numbers, recipes, theirs))
        process.start()
        theirs.close()
        at, kind = numbers[0], "died"
        with contextlib.suppress(EOFError):
            while at != numbers[-1] or kind != "done":
                if not ours.poll(MAX_SECONDS):
                    kind = "hangs"
                    break
                at, said = ours.recv()
                kind = "died" if said is None else "done"
                if said:
                    yield (at, *said)
        process.kill()
        process.join()
        if kind != "done":
            yield at, kind, f"status {process.exitcode}" if kind == "died" else ""
        numbers = numbers[numbers.index(at) + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="mutations")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--verbose", action="store_true", help="show every one that is not refused")
    args = parser.parse_args()
    recipes = [r for r in sorted(glob.glob(RECIPES)) if read_config(r).DISTILL.METHODS]
    numbers = list(range(args.first, args.first + args.count))
    counts: Dict[str, int] = collections.Counter()
    harmless = ("refused",) if args.verbose else ("refused", "trains")
    with ThreadPoolExecutor(args.jobs) as pool:
        shares = [numbers[i :: args.jobs] for i in range(args.jobs)]
        lists = pool.map(lambda x: report(args.seed, x, recipes, harmless), shares)
        for found in lists:
            counts.update(found)
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))


def report(
    seed: int, numbers: List[int], recipes: List[str], harmless: Tuple[str, ...]
) -> Dict[str, int]:
    """Prints the outcomes that are not harmless, and counts all."""
    counts: Dict[str, int] = collections.Counter()
    for number, kind, said in outcomes(seed, numbers, recipes):
        counts[kind] += 1
        if kind not in harmless:
            recipe, changes = mutation_of(seed, number, recipes)
            print(f"{number}: {kind}: {os.path.basename(recipe)} {changes}: {said}", flush=True)
    return counts


if __name__ == "__main__":
    main()
