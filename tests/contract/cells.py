"""Every registered method on every kind of student that it supports: the cells of the contract
tests, each built once and run for a few steps."""

import contextlib
import copy
import functools
from typing import Callable, Dict, List, NamedTuple, Tuple

import torch
from detectron2.utils.events import EventStorage
from toys import SMALLER, batch, config, gradients

from d2kd.checkpoint.weights import checksum
from d2kd.distillation import Teacher, TeacherStudent, build_detector
from d2kd.distillation.rebuild import Options, rebuild
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.methods.core import TermSchedule
from d2kd.views import CannotRead, build_family

CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
CASCADE += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
STUDENTS: Dict[str, Tuple[str, List]] = {
    "RetinaNet": ("shapes/baselines/retinanet_tiny.yaml", []),
    "FCOS": ("shapes/baselines/fcos_tiny.yaml", []),
    "PaperFCOS": ("shapes/baselines/paper_fcos_tiny.yaml", []),
    "ATSS": ("shapes/baselines/atss_tiny.yaml", []),
    "GFL": ("shapes/baselines/gfl_tiny.yaml", []),
    "FasterRCNN": ("shapes/baselines/faster_rcnn_tiny.yaml", []),
    "MaskRCNN": ("shapes/baselines/mask_rcnn_tiny.yaml", []),
    "CascadeRCNN": ("shapes/baselines/faster_rcnn_tiny.yaml", CASCADE),
}
DENSE = ("RetinaNet", "FCOS", "PaperFCOS", "ATSS", "GFL")
# What must be supported, so that a method which refuses everything fails. A method that is not
# listed runs on all that it supports.
EXPECTED = {
    "CrossKD": DENSE,
    "DeFeat": tuple(STUDENTS),
    "FRS": tuple(STUDENTS),
    "GDetKD": tuple(STUDENTS),
    "HGD": tuple(STUDENTS),
    "LD": ("GFL",),
    "MGD": tuple(STUDENTS),
    "Mimicking": DENSE,
    "PKD": tuple(STUDENTS),
}
# What makes methods small, as the detectors are: keys of their nodes
OPTS = {"GDetKD": {"QUEUE_SIZE": 100}, "CrossKD": {"DEPTH": 1}}
SIZES = ((96, 128), (80, 100))
BOXES = {
    "no objects": [[], []],
    "odd boxes": [
        [[5, 5, 6, 6], [7, 7, 7, 7]],
        [[0, 0, 100, 80], [90, 70, 100, 80], [0, 0, 1, 1]],
    ],
}


class Cell(NamedTuple):
    """A method on a kind of student, with the teacher and the terms that fit."""

    method: str
    student: str
    teacher: str
    terms: Tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method}-{self.student}"


@functools.cache
def new_detector(name: str, seed: int, width: int = 8):
    """An untrained detector; copy it before use."""
    path, opts = STUDENTS[name]
    torch.manual_seed(seed)
    return build_detector(config(path, [*SMALLER, "MODEL.BASIC_RESNET.WIDTH", width, *opts]))


@functools.cache
def families(student: str, teacher: str):
    return build_family(new_detector(student, 3)), build_family(new_detector(teacher, 7, 16))


def node_of(method: str, terms=()):
    """The method's config node with some terms alone, each of weight 1."""
    node = DISTILLER_REGISTRY.get(method).default_config()
    for key, value in OPTS.get(method, {}).items():
        node[key] = value
    if "DENSE" in node:
        node.DENSE.ROIS_PER_IMAGE = 32
    for term in DISTILLER_REGISTRY.get(method).all_terms():
        node[term.upper()].WEIGHT = float(term in terms)
        node[term.upper()].WARMUP_ITERS = 0
    return node


def fits(method: str, student: str, teacher: str, terms) -> bool:
    """Whether both detectors give what some terms read, and the method accepts the pair."""
    cls, node = DISTILLER_REGISTRY.get(method), node_of(method, terms)
    ours, theirs = families(student, teacher)
    try:
        for reads in cls.reads(node, ours, theirs).values():
            ours.observed(reads.student)
            theirs.observed(reads.teacher)
        cls.check_pair(node, ours, theirs)
        cls(node, ours, theirs)
    except (CannotRead, UserError):
        return False
    return True


@functools.cache
def find_cell(method: str, student: str):
    """The cell with a teacher of the student's kind, else with a Faster R-CNN; None if neither."""
    for teacher in (student, "FasterRCNN"):
        terms = DISTILLER_REGISTRY.get(method).all_terms()
        usable = tuple(t for t in terms if fits(method, student, teacher, [t]))
        if usable and (teacher == "FasterRCNN" or method != "GDetKD" or student not in DENSE):
            return Cell(method, student, teacher, usable)
    return None


def all_cells() -> List[Cell]:
    found = [find_cell(method, student) for method, _ in DISTILLER_REGISTRY for student in STUDENTS]
    return [cell for cell in found if cell is not None]


def build_cell(cells: List[Cell], start_iter: int = 0) -> TeacherStudent:
    """A new teacher–student model of one or more methods with the same student and teacher."""
    student = copy.deepcopy(new_detector(cells[0].student, 3))
    teacher = copy.deepcopy(new_detector(cells[0].teacher, 7, 16))
    frozen = Teacher(teacher, input_format="BGR", student=student, student_format="BGR")
    ours, theirs = build_family(student), frozen.family
    distillers, reads, schedules = {}, {}, {}
    for cell in cells:
        node = node_of(cell.method, cell.terms)
        torch.manual_seed(11)
        distillers[cell.method] = DISTILLER_REGISTRY.get(cell.method)(node, ours, theirs)
        declared = distillers[cell.method].reads(node, ours, theirs)
        for term in cell.terms:
            reads[cell.method, term] = declared[term]
            schedule = TermSchedule(1.0, max_iter=10**6, start_iter=start_iter)
            schedules[cell.method, term] = schedule
    rebuild(frozen, ours, {read for r in reads.values() for read in r.teacher}, Options())
    return TeacherStudent(
        student=student, teacher=frozen, distillers=distillers, reads=reads, schedules=schedules
    )


class Step(NamedTuple):
    """One training step."""

    losses: Dict[str, torch.Tensor]
    gradients: Dict[str, torch.Tensor]


def run_steps(
    model,
    count: int = 2,
    backward: bool = True,
    chosen: Callable[[str], bool] = lambda loss: True,
    **batch_options,
) -> List[Step]:
    """Steps with learning rate 0 from the same random numbers, with the gradients of the chosen
    losses. The scripted losses of Detectron2 run unoptimised, as their first call does: else it
    would differ from later ones."""
    inputs = batch(SIZES, **batch_options)
    torch.manual_seed(5)
    model.train()
    steps = []
    with EventStorage(1000), torch.jit.optimized_execution(False):
        for _ in range(count):
            losses = model(with_masks(inputs))
            model.zero_grad(set_to_none=True)
            if backward:
                sum(value for name, value in losses.items() if chosen(name)).backward()
            steps.append(Step({k: v.detach() for k, v in losses.items()}, gradients(model)))
    return steps


def with_masks(inputs):
    """Every object as its whole box, for Mask R-CNN."""
    from detectron2.structures import PolygonMasks

    for x in inputs:
        boxes = x["instances"].gt_boxes.tensor.tolist()
        polygons = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes]
        x["instances"].gt_masks = PolygonMasks(polygons)
    return inputs


@functools.cache
def plain_steps(student: str) -> Tuple[List[Step], str, Tuple[str, ...]]:
    """Plain training of a student: its steps, checksum and names afterwards."""
    model = copy.deepcopy(new_detector(student, 3))
    steps = run_steps(model, count=3)
    return steps, checksum(model), tuple(model.state_dict())


@contextlib.contextmanager
def counting(model: TeacherStudent):
    """Counts the calls of both detectors' backbones, and of the teacher's heads."""
    calls: Dict[str, int] = {}
    modules = {
        "student backbone": model.student.backbone,
        "teacher backbone": model.teacher.family.stage_module,
    }
    if model.teacher.family.dense_head is not None:
        modules["teacher dense head"] = model.teacher.family.dense_head.module

    def count(name):
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    handles = [m.register_forward_hook(count(name)) for name, m in modules.items()]
    yield calls
    for handle in handles:
        handle.remove()
