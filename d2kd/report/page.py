"""The page about runs: one file, which needs nothing else."""

import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import jinja2

import d2kd
from d2kd.distillation import TeacherStudent, fill_from_run, million_parameters, student_on_meta
from d2kd.distillation.pair_report import LOSS_HEADERS, PAIR_HEADERS, loss_rows, pair_rows
from d2kd.engine.results import METRICS
from d2kd.engine.trained_run import TrainedRun
from d2kd.errors import UserError
from d2kd.prediction import Predictor
from d2kd.views import any_family
from d2kd.writing import atomic_write, refuse_no_folder

from .facts import RunFacts, facts_of
from .figures import ap_curves, class_bars, loss_curves
from .gradient_maps import GradientMaps, gradient_maps
from .models import Shown, detections, shown_images, teacher_student, with_objects
from .pictures import SCORE, Grid, before_and_after, map_rows, side_by_side

REPORT = "report.html"
# By it a page of ours is known
GENERATOR = "d2kd report"
NUM_DETECTIONS = 4  # images on which detections are shown
NUM_MAPPED = 2  # images on which it is shown what methods looked at


class Table(NamedTuple):
    """A table of a page."""

    headers: Sequence[str]
    rows: Sequence[Sequence]


class Pictures(NamedTuple):
    """Pictures of a page under a title."""

    title: str
    words: str
    grid: Grid


class Pair(NamedTuple):
    """What a page shows of a run that distilled."""

    facts: RunFacts
    model: Optional[TeacherStudent]  # None if it could not be had
    missing: str  # why


def write_report(runs: Sequence[TrainedRun], baseline: Optional[TrainedRun], path: str) -> None:
    """Writes a page about runs, whole or not at all.

    Args:
        runs: one or more.
        baseline: what they are compared with.
        path: the file, which may hold an older page of d2kd's.

    Raises:
        UserError: if the file is something else, or cannot be written.
    """
    refuse_foreign(path)
    facts = facts_of(runs, baseline)
    page = _template().render(
        generator=GENERATOR, version=d2kd.__version__, facts=facts, **_content(facts)
    )
    with atomic_write(path) as f:
        f.write(page)


def refuse_foreign(path: str) -> None:
    """
    Raises:
        UserError: if a file is there that is no page of d2kd's, or no file can be.
    """
    refuse_no_folder(path, "--output")
    if os.path.isdir(path):
        raise UserError(f"--output is '{path}', a folder: give the name of a file")
    if os.path.exists(path):
        head = ""
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                head = f.read(2000)
        if f'<meta name="generator" content="{GENERATOR} ' not in head:
            raise UserError(f"--output is '{path}', a file that is no report: give another name")


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
    return jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")


def _content(facts: List[RunFacts]) -> Dict[str, Any]:
    tasks = list(dict.fromkeys(task for f in facts for task in f.tasks))
    pairs = [_pair(f) for f in facts if f.methods]
    pictures, why = _or_reason(lambda: _detections(facts, pairs))
    return {
        "summary": [_summary(facts, task) for task in tasks],
        "pairs": [(p, *_tables(p)) for p in pairs],
        "losses": loss_curves(facts) if any(f.losses for f in facts) else "",
        "ap": ap_curves(facts, tasks) if tasks else "",
        "classes": [(task, class_bars(facts, task), _classes(facts, task)) for task in tasks],
        "detections": pictures,
        "no_detections": why,
        "score": SCORE,
        "looks": [(p.facts, *_or_reason(lambda p=p: _pictures_of_maps(p))) for p in pairs],
        "cost": _cost(facts, pairs),
    }


def _or_reason(make: Callable[[], Any]) -> tuple:
    """What a part of the page shows, or why it shows nothing: the data or the teacher may be gone,
    and the rest of the page is worth having."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


def _pair(facts: RunFacts) -> Pair:
    return Pair(facts, *_or_reason(lambda: teacher_student(facts)))


def _tables(pair: Pair) -> List[Optional[Table]]:
    model = pair.model
    if model is None:
        return [None, None]
    rows = pair_rows(model.family, pair.facts.cfg.INPUT.FORMAT, model.teacher)
    losses = loss_rows(dict(model.distillers.items()), model.reads, model.schedules)
    return [Table(PAIR_HEADERS, rows), Table(LOSS_HEADERS, losses)]


def _summary(facts: Sequence[RunFacts], task: str) -> Table:
    headers = [task, *(f"{m} at the end" for m in METRICS), "gain in AP", "best AP", "after"]
    return Table(headers, [_summary_row(f, facts, task) for f in facts])


def _summary_row(facts: RunFacts, everyone: Sequence[RunFacts], task: str) -> List[str]:
    last = [_number(facts.last(f"{task}/{metric}")) for metric in METRICS]
    best = facts.best(f"{task}/AP")
    found = [_number(best[1]), f"{best[0]} iterations"] if best else ["", ""]
    name = f"{facts.name}{facts.state(f'{task}/AP')}"
    return [name, *last, _gain(facts, everyone, f"{task}/AP"), *found]


def _gain(facts: RunFacts, everyone: Sequence[RunFacts], metric: str) -> str:
    plain = next((f for f in everyone if f.is_baseline), None)
    baseline = plain.last(metric) if plain else None
    value = facts.last(metric)
    if baseline is None or value is None or facts.is_baseline:
        return ""
    if list(plain.cfg.DATASETS.TEST) != list(facts.cfg.DATASETS.TEST):
        return "on other data"
    return f"{value - baseline:+.1f}"


def _number(value: Optional[float], digits: int = 1) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _classes(facts: Sequence[RunFacts], task: str) -> Table:
    tables = [f.class_ap(task) for f in facts]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [[name, *(_number(table.get(name)) for table in tables)] for name in names]
    return Table(["class", *(f.name for f in facts)], rows)


def _detections(facts: Sequence[RunFacts], pairs: Sequence[Pair]) -> Grid:
    cfg = facts[-1].cfg
    shown = shown_images(cfg, NUM_DETECTIONS)
    found, num_classes = {}, 0
    for f in facts:
        student = f.run.student()
        num_classes = any_family(student).num_classes
        if num_classes is None:  # as many as there are names to draw
            num_classes = len(shown.metadata.get("thing_classes", ()))
        found[f.name] = detections(Predictor(student, f.cfg), shown.dicts)
    for name, pair in _teachers(pairs).items():
        teacher, teacher_cfg = pair.model.teacher, pair.facts.cfg.clone()
        teacher_cfg.INPUT.FORMAT = teacher.input_format
        found[name] = detections(Predictor(teacher.detector, teacher_cfg), shown.dicts)
    return side_by_side(shown, found, num_classes)


def _teachers(pairs: Sequence[Pair]) -> Dict[str, Pair]:
    """A pair for every teacher, by what it is called."""
    first = {p.model.teacher.weights: p for p in reversed(pairs) if p.model}
    alone = len(first) == 1
    return {"teacher" if alone else f"teacher of {p.facts.name}": p for p in first.values()}


def _pictures_of_maps(pair: Pair) -> List[Pictures]:
    if pair.model is None:
        raise UserError(pair.missing)
    cfg = pair.facts.cfg
    shown: Shown = shown_images(cfg, NUM_MAPPED)
    inputs = with_objects(cfg, shown.dicts)
    found: Dict[str, GradientMaps] = {}  # by checkpoint
    first = pair.facts.first_checkpoint()
    for path in filter(None, [first, pair.facts.run.weights]):
        fill_from_run(pair.model, path)
        name = os.path.basename(path)
        found[name] = gradient_maps(pair.model, inputs, cfg.SOLVER.MAX_ITER // 2)
    strides = {name: s for x in found.values() for name, s in x.strides.items()}
    pulls = before_and_after(found, lambda x: x.pulls)
    own = before_and_after(found, lambda x: x.own)
    return [
        Pictures(title, _values(title, found), map_rows(cfg, inputs, times, strides))
        for title, times in [*pulls.items(), *own.items()]
    ]


def _values(loss: str, found: Dict[str, GradientMaps]) -> str:
    """The values of a loss on these images, by checkpoint."""
    values = {time: x.values[loss] for time, x in found.items() if loss in x.values}
    words = ", ".join(f"{value:.3g} with {time}" for time, value in values.items())
    return f"The loss on these images: {words}" if words else ""


def _cost(facts: Sequence[RunFacts], pairs: Sequence[Pair]) -> Table:
    headers = ["", "student (M)", "teacher (M)", "seconds per step"]
    headers += ["data", "student", "teacher", "distillation", "memory (MiB)"]
    models = {pair.facts.name: pair.model for pair in pairs}
    return Table(headers, [_cost_row(f, models.get(f.name)) for f in facts])


def _cost_row(facts: RunFacts, model: Optional[TeacherStudent]) -> List[str]:
    seconds, memory = facts.seconds(), facts.memory()
    parts = ("total", "data", "student", "teacher", "distillation")
    return [
        facts.name,
        f"{million_parameters(student_on_meta(facts.cfg)):.2f}",
        f"{million_parameters(model.teacher.detector):.2f}" if model else "",
        *(_number(seconds.get(part), 3) for part in parts),
        _number(memory, 0),
    ]
