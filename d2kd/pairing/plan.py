"""All that ``--student`` and ``--teacher`` stand for: one run, or two where the teacher is trained
on the student's data first."""

import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.model_zoo import FINAL_WEIGHTS

from .choice import Choice, choose
from .finetune import finetuned, teacher_recipe
from .pair import Pair, open_pair
from .recipe import RECIPE_YAML, output_of, recipe_of, write_recipe

TEACHER_FOLDER = "teacher"  # in the run's folder
# What says which detector the teacher is
_OF_TEACHER = tuple(f"DISTILL.TEACHER.{key}" for key in ("CONFIG", "WEIGHTS", "OPTS"))


class Plan(NamedTuple):
    """What is going to be trained.

    Attributes:
        pair: the two detectors, the teacher as it will teach.
        choice: the methods, and why.
        output: folder of the student's run.
        recipe: content of its YAML.
        teacher: content of the YAML of the teacher's own run, in :attr:`teacher_folder`; None if
            the teacher is taken as it is.
        note: what the classes of the two have to do with it; "" if they are the same.
    """

    pair: Pair
    choice: Choice
    output: str
    recipe: Dict[str, Any]
    teacher: Optional[Dict[str, Any]]
    note: str

    @property
    def teacher_folder(self) -> str:
        return os.path.join(self.output, TEACHER_FOLDER)

    def __str__(self) -> str:
        pair, choice = self.pair, self.choice
        facts = [
            ("student", f"{pair.base}: {pair.student_family.name}, {pair.student_classes}"),
            ("teacher", f"{pair.teacher}: {pair.teacher_family.name}, {pair.teacher_classes}"),
            ("", f"weights: {pair.weights or 'none'}"),
            ("classes", self.note),
            ("method", f"{', '.join(choice.methods)}: {choice.reason}"),
            *(("", line) for line in self._values()),
        ]
        if choice.others:
            facts.append(("", f"others that fit, with --method: {', '.join(choice.others)}"))
        return "\n".join(f"{name:9}{text}" for name, text in facts if text)

    def _values(self) -> List[str]:
        cfg = self.pair.cfg
        architecture, lines = cfg.MODEL.META_ARCHITECTURE, []
        for name in self.choice.methods:
            method = DISTILLER_REGISTRY.get(name)
            node = method.node_of(cfg)
            terms = method.enabled_terms(node)
            weights = ", ".join(f"{term} {node[term.upper()].WEIGHT:g}" for term in terms)
            source = method.source_of_values(node, architecture)
            lines.append(f"weights of {name}: {weights}" + (f" ({source})" if source else ""))
        return lines

    def write_teacher(self) -> str:
        """Writes the YAML of the teacher's own run and returns its path."""
        about = ["The teacher, trained on the student's data: step 1 of 2"]
        return write_recipe(self.teacher_folder, self.teacher or {}, about)

    def write(self, replace: bool = False) -> str:
        """Writes the YAML of the student's run and returns its path; ``replace`` as in
        :func:`~d2kd.pairing.recipe.write_recipe`."""
        about = [
            f"{', '.join(self.choice.methods)}: {self.choice.reason}",
            "Once more: d2kd train --config-file <this file> OUTPUT_DIR <another folder>",
        ]
        return write_recipe(self.output, self.recipe, about, replace)


def make_plan(
    student: str,
    teacher: str,
    methods: Sequence[str] = (),
    opts: Sequence[str] = (),
    finetune: bool = False,
    needs_weights: bool = True,
) -> Plan:
    """Nothing is written.

    Args:
        student, teacher: see :func:`~d2kd.pairing.pair.open_pair`.
        methods: names; chosen by default.
        opts: changes to the student's config, KEY VALUE ...
        finetune: train the teacher on the student's data first.
        needs_weights: refuse a teacher that nobody knows weights for.

    Raises:
        UserError: if a name is unknown, or no method fits.
    """
    pair = open_pair(student, teacher, opts)
    if needs_weights and not pair.weights:
        raise UserError(
            f"--teacher is '{teacher}': no weights are known for it; train it first (d2kd train "
            f"--config-file {pair.teacher}), or give DISTILL.TEACHER.WEIGHTS <file>"
        )
    asked = list(methods) or list(pair.cfg.DISTILL.METHODS)
    taught = finetuned(pair) if finetune else pair
    choice = choose(taught, asked)
    output = output_of(pair, choice.methods, opts)
    teacher_content, note = None, _note(pair)
    if finetune:
        folder = os.path.join(output, TEACHER_FOLDER)
        teacher_content = teacher_recipe(pair, folder)
        note = f"{pair.teacher} is trained on the student's data first"
        there = os.path.abspath(folder)  # the recipe may be used from another folder
        taught = taught._replace(
            teacher=os.path.join(there, RECIPE_YAML), weights=os.path.join(there, FINAL_WEIGHTS)
        )
        opts = _without(opts, _OF_TEACHER)  # its own recipe has them
    content = recipe_of(taught, choice.methods, opts, output)
    return Plan(taught, choice, output, content, teacher_content, note)


def _without(opts: Sequence[Any], keys: Sequence[str]) -> List[Any]:
    """KEY VALUE ... but for some keys."""
    pairs = zip(opts[::2], opts[1::2])
    return [word for key, value in pairs if key not in keys for word in (key, value)]


def _note(pair: Pair) -> str:
    if pair.same_classes:
        return ""
    return (
        "the teacher does not know the student's: what it predicts cannot be learned, its features "
        "can; --finetune-teacher trains it on the student's data first"
    )
