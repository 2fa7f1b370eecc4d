#!/usr/bin/env python
"""Writes docs/recipes.md from the configs and docs/recipes.yaml.

python tools/recipes_page.py
python tools/recipes_page.py --check

With ``--check`` nothing is written; the exit status tells whether the page is up to date.
"""

import sys
from decimal import Decimal
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import yaml
from generated import ROOT, write_or_check

from d2kd.catalogue.configs import bases, configs, recipes, tables
from d2kd.catalogue.known_numbers import published

CONFIGS, DATA, PAGE = ROOT / "configs", ROOT / "docs/recipes.yaml", ROOT / "docs/recipes.md"

INTRODUCTION = """\
# Recipes

<!-- Written by tools/recipes_page.py from configs/ and docs/recipes.yaml: change those. -->

Every recipe that comes with d2kd: which row of which table it is, what teaches, which baseline it
has to be compared with, and what the paper reports. AP, gains, and the AP of teachers and baselines
are other people's: box AP on COCO val2017, AP50 on VOC 2007.
**No recipe on COCO or VOC has been run here, nor timed on a GPU.** `d2kd check` tells memory and
hours on the machine at hand; what a method adds to a step, in time and memory on a CPU, is in
[speed.md](speed.md).

Start with a row that its authors report without a doubt about its settings:

{sure}

- **Teacher**: its config, and its published AP; in brackets what the source of the row says, where
  that differs. Weights are *MMDetection's* or those of *Detectron2's* model zoo, downloaded at the
  start, or the teacher is *trained* first. Where "teacher trained first" stands, that recipe trains
  it here.
- **Baseline**: the plain student to train beside it, its AP likewise. Compare with your own run of
  it, not with this number: [differences from MMDetection](differences.md) remain.
- **Reported**: AP of the distilled student, and the gain over the baseline of the same source.
- **Source**: *authors* (their abstract or README) and *third party* (another paper's or project's
  table) were read; a *note* is somebody's reading note of the paper, which was not compared with
  the paper itself. Then what is not certain about the recipe. The header of each config says more.
- **Iterations**: of 16 images, of the student; a teacher that is trained first comes on top.
"""

BEFORE = """\
## Running a row

Data sets are laid out as [datasets/README.md](../datasets/README.md) says. torchvision's ResNets,
and what MMDetection and Detectron2's model zoo publish, are downloaded at the start.

The schedules are those of 16 images per step, 2 on each of 8 GPUs. On fewer (here 2) the linear
rule keeps 2 images per GPU, divides the learning rate and multiplies all numbers of iterations; it
can stand at the end of any command:

<!-- needs: COCO, GPU -->
```sh
d2kd train --num-gpus 2 --config-file {example} \\
    SOLVER.REFERENCE_WORLD_SIZE 8
```

The rows of an ablation are one file; `d2kd compare FILE --commands` prints the command
of each, to which `--num-gpus 8` is added.

Below, one row of each method, in order. Training ends with an evaluation. The folder of a run is
`output/<its name>`; an interrupted one goes on with `--resume`.
"""

EMBEDDED = """\
## Embedded benchmark

These run on a CPU in minutes; [results.md](results.md) holds what was measured.
"""


def teacher_of(recipe: str) -> str:
    """``mmdet/retinanet_R_101_FPN_2x.yaml``, as the recipe names it."""
    return configs()[recipe].teacher


def baseline_of(recipe: str) -> str:
    """``baselines/retinanet_R_50_FPN_2x.yaml``: the plain student that a recipe is based on."""
    names = (config.file for config in bases(configs()[recipe]))
    return next(name for name in names if Path(name).parent.name == "baselines")


def iterations_of(recipe: str) -> int:
    """``SOLVER.MAX_ITER`` of a recipe."""
    solvers = (config.own.get("SOLVER", {}) for config in bases(configs()[recipe]))
    return next(solver["MAX_ITER"] for solver in solvers if "MAX_ITER" in solver)


def trained_variant(recipe: str) -> Optional[str]:
    """The recipe with the same teacher, trained first; None if there is none."""
    name = recipe.replace("-mmdet_", "_")
    return name if name != recipe and (CONFIGS / f"{name}.yaml").exists() else None


def check(data: Dict) -> None:
    """
    Raises:
        SystemExit: for a recipe without an entry, or an entry without a recipe.
    """
    on_coco = [r.name for r in recipes() if not r.name.startswith("shapes/")]
    variants = {trained_variant(name) for name in on_coco}
    ablations = {name for name in tables() if not name.startswith("shapes/")}
    for kind, there in (("recipes", set(on_coco) - variants), ("tables", ablations)):
        listed = set(data[kind])
        for name in sorted(there ^ listed):
            what = "has no entry" if name in there else "does not exist"
            sys.exit(f"docs/recipes.yaml, {kind}: configs/{name}.yaml {what}")


def link(config: str, text: str = "") -> str:
    name = Path(config).stem
    if not (CONFIGS / config).exists():  # the model zoo's
        return f"{name}"
    return f"[{text or name}](../configs/{config})"


def teacher_cell(data: Dict, recipe: str) -> str:
    config, entry = teacher_of(recipe), data["recipes"].get(recipe, {})
    ap, other = entry.get("weights", published(config)), entry.get("teacher")
    folder = config.split("/")[0]
    origin = {"mmdet": "MMDetection's", "baselines": "trained"}.get(folder, "Detectron2's")
    return f"{link(config)}{numbers(ap, other)}; *{origin}*"


def numbers(ap: Optional[float], other: Optional[float]) -> str:
    """An AP, and in brackets that of the row's source where it is another."""
    return (f", {ap}" if ap else "") + (f" ({other})" if other else "")


def reported(ap: Optional[float], plain: Optional[float]) -> str:
    if ap is None:
        return ""
    if plain is None:
        return f"{ap}"
    return f"{ap} ({Decimal(str(ap)) - Decimal(str(plain)):+})"


def recipe_row(data: Dict, recipe: str) -> List[str]:
    entry, baseline = data["recipes"][recipe], baseline_of(recipe)
    variant = trained_variant(recipe)
    source = ", unsure: ".join(str(entry[x]) for x in ("source", "doubt") if entry.get(x))
    own = published(baseline)
    plain = entry.get("plain", own)
    return [
        link(f"{recipe}.yaml")
        + (f", {link(f'{variant}.yaml', 'teacher trained first')}" if variant else ""),
        entry.get("row", "none"),
        teacher_cell(data, recipe),
        link(baseline) + numbers(own, plain if plain != own else None),
        reported(entry.get("ap"), plain),
        source,
        f"{iterations_of(recipe):,}".replace(",", " "),
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


HEAD = ("recipe", "row", "teacher", "baseline", "reported", "source", "iterations")


def table_of(data: Dict, name: str) -> str:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    aps = data["tables"][name]
    unknown = set(aps) - {"plain student", *content["ROWS"]}
    if unknown:
        sys.exit(f"docs/recipes.yaml, tables: {name} has no row {sorted(unknown)}")
    rows = [[label, str(aps.get(label, ""))] for label in ("plain student", *content["ROWS"])]
    text = f"Ablation {link(f'{name}.yaml')}, not run"
    if not aps:
        return f"{text}; no published numbers: {len(rows) - 1} rows beside the plain student."
    return f"{text}; AP of a note:\n\n{markdown(('row', 'AP'), rows)}"


def method_section(data: Dict, folder: str) -> str:
    method = data["methods"][folder]
    names = [n for n in data["recipes"] if n.startswith(f"{folder}/")]
    parts = [f"## {method['name']}", f"[Paper]({method['paper']}), [page](methods/{folder}.md)."]
    if "remark" in method:
        parts.append(method["remark"])
    parts.append(markdown(HEAD, [recipe_row(data, n) for n in names]))
    parts += [table_of(data, n) for n in tables() if n.startswith(f"{folder}/")]
    parts.append("Not here:\n\n" + "\n".join(f"- {line}" for line in method["missing"]))
    return "\n\n".join(parts)


def train(config: str, comment: str, *options: str) -> List[str]:
    words = ["d2kd train --num-gpus 8", *options, f"--config-file {config}"]
    return [f"# {comment}", " ".join(words)]


def commands(data: Dict, folder: str) -> str:
    method = data["methods"][folder]
    recipe = method["commands"]
    entry, baseline, teacher = data["recipes"][recipe], baseline_of(recipe), teacher_of(recipe)

    def named(what: str, ap: Optional[float]) -> str:
        return f"{what}, {ap} AP reported" if ap else what

    lines = []
    if teacher.startswith("mmdet/"):
        ap = published(teacher)
        about = f"the teacher, {ap} AP published (small differences: docs/differences.md)"
        lines += train(teacher, about, "--eval-only")
    elif teacher.startswith("baselines/"):
        lines += train(teacher, named("the teacher", published(teacher)))
    plain = entry.get("plain", published(baseline))
    lines += train(baseline, named("the plain student", plain))
    lines += train(f"{recipe}.yaml", named(f"with {method['name']}", entry.get("ap")))
    block = "\n".join(["<!-- needs: COCO, GPU -->", "```sh", *lines, "```"])
    return f"**{method['name']}**\n\n{block}"


def embedded() -> str:
    rows = []
    for recipe in recipes():
        if recipe.name.startswith("shapes/"):
            cells = [recipe.file, recipe.teacher, baseline_of(recipe.name)]
            rows.append([link(x, x[len("shapes/") : -len(".yaml")]) for x in cells])
    return EMBEDDED + "\n" + markdown(("recipe", "teacher", "baseline"), rows)


def sure_list(data: Dict) -> str:
    return "\n".join(f"- {link(f'{name}.yaml', name)}" for name in sure_rows(data))


def sure_rows(data: Dict) -> List[str]:
    """The recipes whose AP is the authors' own, and whose settings are certain."""
    return [
        name
        for name, entry in data["recipes"].items()
        if entry.get("source") == "authors" and entry.get("ap") and not entry.get("doubt")
    ]


def page(data: Dict) -> str:
    """The whole page."""
    check(data)
    example = f"{data['methods']['frs']['commands']}.yaml"
    sections = [
        INTRODUCTION.format(sure=sure_list(data)).strip(),
        *(method_section(data, folder) for folder in data["methods"]),
        BEFORE.format(example=example).strip(),
        *(commands(data, folder) for folder in data["methods"]),
        embedded(),
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    write_or_check(PAGE, lambda: page(yaml.safe_load(DATA.read_text())))
