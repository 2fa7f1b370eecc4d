"""From a config to a teacher–student model, or to the plain student."""

import logging
from typing import Dict, Tuple

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from d2kd.config import add_distill_config, load_yaml
from d2kd.errors import UserError, nearest
from d2kd.methods import DISTILLER_REGISTRY, Distiller
from d2kd.methods.schedule import TermSchedule
from d2kd.model_zoo import resolve_config, zoo_weights

from .families import Family, build_family
from .report import pair_report
from .teacher import Teacher
from .weights import load_teacher_weights

logger = logging.getLogger(__name__)


def build_detector(cfg: CfgNode) -> nn.Module:
    """The detector that ``MODEL.META_ARCHITECTURE`` names, on ``MODEL.DEVICE``.

    Raises:
        UserError: if the name is unknown, or the device is not there.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}' but no CUDA device is available: "
            "add 'MODEL.DEVICE cpu' at the end of the command"
        )
    return _architecture(cfg)(cfg).to(torch.device(cfg.MODEL.DEVICE))


def _architecture(cfg: CfgNode) -> type:
    name = cfg.MODEL.META_ARCHITECTURE
    known = [k for k, _ in META_ARCH_REGISTRY]
    if name not in known:
        raise UserError(f"MODEL.META_ARCHITECTURE is '{name}': {nearest(name, known)}")
    return META_ARCH_REGISTRY.get(name)


def build_model(cfg: CfgNode) -> nn.Module:
    """The model that a config trains: the plain student if nothing is distilled, else a
    :class:`~d2kd.modeling.teacher_student.TeacherStudent` around it.

    ``MODEL`` always describes the student, so stock Detectron2 reads a recipe as its student.
    """
    if not distilled_methods(cfg):
        return build_detector(cfg)
    model = META_ARCH_REGISTRY.get("TeacherStudent")(cfg)
    return model.to(torch.device(cfg.MODEL.DEVICE))


def distilled_methods(cfg: CfgNode) -> Dict[str, type]:
    """The methods in ``DISTILL.METHODS`` that have a term with a weight, by name.

    Raises:
        UserError: for a name that is not registered or that is listed twice.
    """
    known = dict(DISTILLER_REGISTRY)
    methods = {}
    for name in cfg.DISTILL.METHODS:
        if name not in known:
            raise UserError(f"DISTILL.METHODS names '{name}': {nearest(name, known)}")
        if name in methods:
            raise UserError(f"DISTILL.METHODS names '{name}' twice: list it once")
        methods[name] = known[name]
    return {name: cls for name, cls in methods.items() if cls.enabled_terms(cfg)}


def build_teacher_student_parts(cfg: CfgNode) -> Dict:
    """The constructor arguments of ``TeacherStudent``. Logs a report that compares the pair."""
    student = build_detector(cfg)
    # Whatever is built beside the student must not change its random numbers.
    with torch.random.fork_rng():
        teacher = build_teacher(cfg, student)
        family = build_family(student)
        distillers = {}
        for name, method in distilled_methods(cfg).items():
            _check_offers(method, cfg, family, teacher.family)
            distillers[name] = method(cfg, family, teacher.family)
    schedules = {
        (name, term): _build_schedule(cfg, distiller, name, term)
        for name, distiller in distillers.items()
        for term in sorted(distiller.terms)
    }
    logger.info(pair_report(cfg, family, teacher, distillers))
    return {
        "student": student,
        "teacher": teacher,
        "distillers": distillers,
        "schedules": schedules,
    }


def _check_offers(method: type, cfg: CfgNode, student: Family, teacher: Family) -> None:
    """Refuses terms that read what a detector does not offer."""
    for term in method.enabled_terms(cfg):
        for side, family in (("student", student), ("teacher", teacher)):
            missing = [n for n in getattr(method.requires[term], side) if n not in family.offers]
            if missing:
                raise UserError(
                    f"DISTILL.{method.__name__.upper()}.{term.upper()}.WEIGHT is not 0, but this "
                    f"term reads {', '.join(missing)} of the {side}, and {family.name} offers only "
                    f"{', '.join(sorted(family.offers))}: set it to 0 or take another {side}"
                )


def _build_schedule(cfg: CfgNode, distiller: Distiller, name: str, term: str) -> TermSchedule:
    key = f"DISTILL.{name.upper()}.{term.upper()}"
    node = distiller.node(cfg)[term.upper()]
    given, levels = len(node.LEVEL_WEIGHTS), distiller.levels_of(term)
    if given not in (0, levels):
        expected = f"give {levels}, one per FPN level, or" if levels else "this term has no levels,"
        raise UserError(f"{key}.LEVEL_WEIGHTS has {given} numbers: {expected} none")
    return TermSchedule.from_config(node, cfg.SOLVER.MAX_ITER, key)


def build_teacher(cfg: CfgNode, student: nn.Module) -> Teacher:
    """The teacher that ``DISTILL.TEACHER`` names, filled with its weights.

    Args:
        cfg: the student's config.
        student: the student.

    Raises:
        UserError: if the config or the weights cannot be had, or do not fill every parameter.
    """
    detector, input_format, weights = build_teacher_detector(cfg)
    load_teacher_weights(detector, weights)
    return Teacher(
        detector.to(student.device),
        input_format=input_format,
        student=student,
        student_format=cfg.INPUT.FORMAT,
        precision=cfg.DISTILL.TEACHER.PRECISION,
    )


def build_teacher_detector(cfg: CfgNode) -> Tuple[nn.Module, str, str]:
    """
    Returns:
        the teacher as initialised, on the CPU (weights are read there, so that the processes of a
        run do not meet on one device); its channel order; the address of its weights.
    """
    node = cfg.DISTILL.TEACHER
    if not node.CONFIG:
        raise UserError(
            f"DISTILL.TEACHER.CONFIG is empty, but DISTILL.METHODS is {list(cfg.DISTILL.METHODS)}: "
            "give the teacher's config file, or a name in Detectron2's model zoo"
        )
    path = resolve_config(node.CONFIG, "DISTILL.TEACHER.CONFIG")
    weights = node.WEIGHTS or zoo_weights(node.CONFIG, path)
    if path.endswith(".py"):
        lazy = LazyConfig.apply_overrides(LazyConfig.load(path), list(node.OPTS))
        mapper = lazy.get("dataloader", {}).get("train", {}).get("mapper", {})
        return instantiate(lazy.model), mapper.get("image_format", "BGR"), weights
    teacher_cfg = get_cfg()
    add_distill_config(teacher_cfg)
    load_yaml(teacher_cfg, path, node.OPTS, "DISTILL.TEACHER.OPTS")
    teacher_cfg.MODEL.TIMM.PRETRAINED = False  # its checkpoint fills everything
    detector = _architecture(teacher_cfg)(teacher_cfg)
    return detector, teacher_cfg.INPUT.FORMAT, weights or teacher_cfg.MODEL.WEIGHTS
