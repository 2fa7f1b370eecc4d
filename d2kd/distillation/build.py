"""From a config to a teacher–student model, or to the plain student."""

import logging
from typing import Dict, List, Mapping, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from d2kd.checkpoint import load_teacher_weights
from d2kd.config import check_config
from d2kd.data.classes import class_names_of
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY, Distiller
from d2kd.methods.core import TermSchedule, unregistered
from d2kd.views import (
    Assignment,
    CannotRead,
    Family,
    Proposals,
    Reads,
    build_family,
)

from .detectors import (
    TeacherSource,
    build_detector,
    build_teacher_detector,
    refuse_missing_weights,
)
from .pair_report import pair_report
from .rebuild import Options, rebuild
from .teacher import Teacher

logger = logging.getLogger(__name__)

_NEVER_WHOLE = "the term never has its whole weight"


def build_model(cfg: CfgNode) -> nn.Module:
    """The model that a config trains: the plain student if nothing is distilled, else a
    :class:`~d2kd.distillation.teacher_student.TeacherStudent` around it.

    ``MODEL`` always describes the student; ``DISTILL`` what teaches it.

    Raises:
        UserError: if a value of the config is wrong, or student, teacher and methods do not fit.
    """
    check_config(cfg)
    if not distilled_methods(cfg):
        model = build_detector(cfg)
        trained = [model]
    else:
        model = META_ARCH_REGISTRY.get("TeacherStudent")(cfg).to(torch.device(cfg.MODEL.DEVICE))
        trained = [model.student, model.distillers]
    if cfg.SOLVER.CHANNELS_LAST:
        for module in trained:
            module.to(memory_format=torch.channels_last)
    return model


def distilled_methods(cfg: CfgNode) -> Dict[str, type]:
    """The methods in ``DISTILL.METHODS`` that have a term with a weight, by name.

    Raises:
        UserError: for a name that is not registered or that is listed twice.
    """
    known = dict(DISTILLER_REGISTRY)
    methods = {}
    for name in cfg.DISTILL.METHODS:
        if name not in known:
            raise UserError(unregistered(name))
        if name in methods:
            raise UserError(f"DISTILL.METHODS names '{name}' twice: list it once")
        methods[name] = known[name]
    return {n: cls for n, cls in methods.items() if cls.enabled_terms(cls.node_of(cfg))}


def build_teacher_student_parts(cfg: CfgNode) -> Dict:
    """The constructor arguments of ``TeacherStudent``. Logs a report that compares the pair."""
    _warn_of_unused_keys(cfg)
    student = build_detector(cfg)
    family = build_family(student)
    # Whatever is built beside the student must not change its random numbers.
    devices = [student.device.index or 0] if student.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        source = build_teacher_detector(cfg)
        reads = declared_reads(cfg, family, build_family(source.detector))
        teacher = _fill_teacher(cfg, source, student, reads)
        distillers = {
            name: method(method.node_of(cfg), family, teacher.family)
            for name, method in distilled_methods(cfg).items()
        }
        filled = [
            line
            for distiller in distillers.values()
            for line in distiller.initialize_student(family, teacher.family)
        ]
    schedules = _build_schedules(cfg, distillers)
    report = pair_report(cfg, family, teacher, distillers, reads, schedules, filled)
    rebuilt = _rebuild(cfg, teacher, family, reads)
    logger.info(report + (f"\nThe teacher runs rebuilt: {rebuilt}" if rebuilt else ""))
    return {
        "student": student,
        "teacher": teacher,
        "distillers": distillers,
        "reads": reads,
        "schedules": schedules,
    }


def _warn_of_unused_keys(cfg: CfgNode) -> None:
    """Of methods that are set up and not used: their name may be missing in the list."""
    for name, method in DISTILLER_REGISTRY:
        node = method.default_config()
        method.use_defaults_of(node, cfg.MODEL.META_ARCHITECTURE)
        if name not in cfg.DISTILL.METHODS and method.node_of(cfg) != node:
            logger.warning(
                f"{method.node_name()} has no effect, DISTILL.METHODS is "
                f"{list(cfg.DISTILL.METHODS)}: add '{name}', or leave out its keys"
            )


def _rebuild(
    cfg: CfgNode, teacher: Teacher, student: Family, reads: Mapping[Tuple[str, str], Reads]
) -> str:
    """Rebuilds the teacher as the config says, and returns what was done."""
    node = cfg.DISTILL.TEACHER
    options = Options(
        node.PRECISION, node.FOLD_NORMS, node.CHANNELS_LAST, node.COMPILE, cfg.SOLVER.AMP.ENABLED
    )
    of_teacher = frozenset(read for asked in reads.values() for read in asked.teacher)
    return rebuild(teacher, student, of_teacher, options)


def declared_reads(cfg: CfgNode, student: Family, teacher: Family) -> Dict[Tuple[str, str], Reads]:
    """What every (method, term) of a run reads.

    Raises:
        UserError: for what one of the two detectors cannot give, with the reason; or if they do
            not fit each other in what a method compares.
    """
    declared = {}
    for name, method in distilled_methods(cfg).items():
        node = method.node_of(cfg)
        of_terms = method.reads(node, student, teacher)
        _check_declared(method, node, of_terms)
        for term, reads in of_terms.items():
            _check_reads(method, node, term, reads, student, teacher)
            declared[name, term] = reads
        method.check_pair(node, student, teacher)
    return declared


def _check_declared(method: type, node: CfgNode, declared: Mapping[str, Reads]) -> None:
    """Refuses a method that does not declare exactly its enabled terms."""
    enabled = method.enabled_terms(node)
    if set(declared) != set(enabled):
        raise UserError(
            f"{method.__name__}.reads declares the terms {sorted(declared)}, those with a weight "
            f"are {sorted(enabled)}: give a Reads for each of these and no other"
        )


def keys_on_classes(reads: Mapping[Tuple[str, str], Reads]) -> List[str]:
    """The config keys of the losses that make sense only if the teacher has the student's classes.

    Args:
        reads: of every (method, term).
    """
    return [
        DISTILLER_REGISTRY.get(name).term_key(term)
        for (name, term), asked in reads.items()
        if asked.compares_classes
    ]


def _check_reads(
    method: type, node: CfgNode, term: str, reads: Reads, student: Family, teacher: Family
) -> None:
    key = method.term_key(term)
    for side, family, asked in (
        ("student", student, reads.student),
        ("teacher", teacher, reads.teacher),
    ):
        for read in asked:
            try:
                family.observe(read)
                if side == "teacher" and isinstance(read, Assignment):
                    raise CannotRead("only a student is assigned ground truth")
                if side == "teacher" and isinstance(read, Proposals):
                    family.check_proposes()
            except CannotRead as why:
                chosen, remedy, knob = "", f"set {key} to 0", reads.knobs.get(type(read))
                if knob is not None:
                    chosen = f" ({method.node_name()}.{knob} is {node[knob]!r})"
                    remedy = f"change {method.node_name()}.{knob}, {remedy}"
                raise UserError(
                    f"{key} is not 0, but this term reads {read} of the {side}{chosen}: {why}; "
                    f"{remedy}, or take another {side}"
                ) from why


def _build_schedules(
    cfg: CfgNode, distillers: Mapping[str, Distiller]
) -> Dict[Tuple[str, str], TermSchedule]:
    """The weight of every (method, term)."""
    return {
        (name, term): _build_schedule(cfg, distiller, term)
        for name, distiller in distillers.items()
        for term in sorted(distiller.terms)
    }


def _build_schedule(cfg: CfgNode, distiller: Distiller, term: str) -> TermSchedule:
    node = distiller.node_of(cfg)[term.upper()]
    given, levels = len(node.LEVEL_WEIGHTS), distiller.levels_of(term)
    if given not in (0, levels):
        expected = f"give {levels}, one per FPN level, or" if levels else "this term has no levels,"
        key = f"{distiller.node_name()}.{term.upper()}"
        raise UserError(f"{key}.LEVEL_WEIGHTS has {given} numbers: {expected} none")
    problem = _problem_of_schedule(node, cfg.SOLVER.MAX_ITER)
    if problem:
        logger.warning(f"{distiller.node_name()}.{term.upper()}.{problem}")
    return TermSchedule.from_config(node, cfg.SOLVER.MAX_ITER)


def _problem_of_schedule(node: CfgNode, max_iter: int) -> str:
    """Why a term never counts as its weight says, beginning with the key that is the cause; "" if
    it does."""
    start, warm_up, stop = node.START_ITER, node.WARMUP_ITERS, node.STOP_ITER
    run = f"the run has {max_iter} iterations"
    if node.LEVEL_WEIGHTS and not any(node.LEVEL_WEIGHTS):
        return "LEVEL_WEIGHTS are all 0: the term has no effect; to leave it out, set WEIGHT to 0"
    if start >= max_iter:
        return f"START_ITER is {start}, {run}: the term never runs"
    if not warm_up or start + warm_up < min(stop or max_iter, max_iter):
        return ""
    if warm_up >= max_iter:
        return f"WARMUP_ITERS is {warm_up}, {run}: {_NEVER_WHOLE}"
    if 0 < stop < max_iter:
        return (
            f"STOP_ITER is {stop}, START_ITER is {start}, WARMUP_ITERS is {warm_up}: {_NEVER_WHOLE}"
        )
    return f"START_ITER is {start}, {run}, WARMUP_ITERS is {warm_up}: {_NEVER_WHOLE}"


def build_teacher(cfg: CfgNode, student: nn.Module) -> Teacher:
    """The teacher that ``DISTILL.TEACHER`` names, filled with its weights.

    Args:
        cfg: the student's config.
        student: the student.

    Raises:
        UserError: if the config or the weights cannot be had, do not fill every parameter, or do
            not fit what is distilled.
    """
    source = build_teacher_detector(cfg)
    reads = declared_reads(cfg, build_family(student), build_family(source.detector))
    return _fill_teacher(cfg, source, student, reads)


def _fill_teacher(
    cfg: CfgNode,
    source: TeacherSource,
    student: nn.Module,
    reads: Mapping[Tuple[str, str], Reads],
) -> Teacher:
    """Reads the weights of a teacher, and puts it beside the student."""
    refuse_missing_weights(cfg, source.weights)
    verdict = load_teacher_weights(
        source.detector,
        source.weights,
        source.input_format,
        class_names_of(cfg.DATASETS.TRAIN),
        keys_on_classes(reads),
    )
    teacher = Teacher(
        source.detector,
        input_format=source.input_format,
        weights=source.weights,
        verdict=verdict,
        student=student,
        student_format=cfg.INPUT.FORMAT,
    )
    logger.info(f"Teacher: its weights have the checksum {teacher.checksum}")
    teacher.detector.to(student.device)  # only now: a checksum on a GPU would copy every tensor
    return teacher
