"""What distillation costs: the plain student's step, the teacher's forward and the distillation
step side by side in one process, with random weights and images."""

import contextlib
import os
import tempfile
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.config import read_config
from d2kd.distillation import TeacherStudent, build_model, distilled_methods, save_random_teacher
from d2kd.distillation.teacher import TeacherPass
from d2kd.engine.allocator import keep_freed_memory
from d2kd.errors import UserError
from d2kd.lazy import is_python, python_overrides
from d2kd.views import Family, Recorder, Regions, RegionSet, StudentView, TeacherView

from .profile import Step, additional, gflops, host_syncs, peak_memory, timed

PARTS = {
    "a": "plain student step",
    "b": "teacher as loaded, as far as needed",
    "t": "the same, rebuilt",
    "c": "distillation step",
}
FORWARDS = ("b", "t")  # parts in which nothing is trained
STANDARD_PARTS = ("a", "b", "c")  # whose ratios are published: t does b's work in another way
_CPU = "CPU"  # with which the words for one begin
# How a teacher is as it is loaded
_AS_LOADED = (
    *("DISTILL.TEACHER.FOLD_NORMS", False, "DISTILL.TEACHER.CHANNELS_LAST", False),
    *("DISTILL.TEACHER.COMPILE", False, "DISTILL.TEACHER.PRECISION", ""),
)
AMP = {"cuda": torch.float16, "cpu": torch.bfloat16}


class Load(NamedTuple):
    """What is measured on, and how often."""

    size: int = 512  # height and width of the images, pixels
    batch: int = 2  # images
    boxes: int = 7  # objects per image
    rounds: int = 9  # timings of each part
    amp: bool = False  # mixed precision: float16 on a GPU, bfloat16 on a CPU


class Case(NamedTuple):
    """A recipe to measure, with overrides."""

    recipe: str
    opts: Tuple[str, ...] = ()
    label: str = ""  # what the overrides make of it, for people

    def as_stock(self) -> CfgNode:
        """What a and b are measured with, whatever the recipe says: plain student and teacher."""
        of_student = () if is_python(self.recipe) else ("SOLVER.CHANNELS_LAST", False)
        return self.config((*_AS_LOADED, *of_student))

    def config(self, changes: Sequence[object] = ()) -> CfgNode:
        """Its config with more changes, KEY VALUE ..., and with random weights.

        Raises:
            UserError: if a change is none.
        """
        cfg = read_config(self.recipe, python_overrides(self.recipe, [*self.opts, *changes]))
        cfg.MODEL.WEIGHTS = ""
        return cfg


def _words(text: str) -> Tuple[str, ...]:
    return tuple(text.split())


_GDETKD = "gdetkd/faster_rcnn_R_18_R_50-zoo-3x_1x.yaml"
_NO_HEADS = "DISTILL.GDETKD.CLS.WEIGHT 0.0 DISTILL.GDETKD.BBOX.WEIGHT 0.0 "
_NO_HEADS += "DISTILL.GDETKD.HEAD_TRANSFER False "
_DEFEAT_HEADS = "DISTILL.DEFEAT.HEAD_OBJECT.WEIGHT 2.0 DISTILL.DEFEAT.HEAD_BACKGROUND.WEIGHT 2.0 "
_DEFEAT_HEADS += "DISTILL.DEFEAT.PROPOSALS_FROM student"
# The table of docs/speed.md
STANDARD = (
    Case("frs/retinanet_R_50_R_101-2x_2x.yaml"),
    Case("frs/faster_rcnn_R_50_R_101-2x_2x.yaml"),
    Case("defeat/retinanet_R_50_R_101-2x_2x.yaml"),
    Case("defeat/faster_rcnn_R_50_R_101-2x_2x.yaml"),
    Case("defeat/faster_rcnn_R_50_R_101-2x_2x.yaml", _words(_DEFEAT_HEADS), "neck and heads"),
    Case("hgd/retinanet_R_50_R_101-1x_1x.yaml"),
    Case("hgd/faster_rcnn_R_50_R_101-1x_1x.yaml"),
    Case("frs/retinanet_R_50_R_101-2x_2x.yaml", ("DISTILL.METHODS", "['PKD']"), "PKD"),
    Case("crosskd/retinanet_R_18_R_50-1x_1x.yaml"),
    Case("crosskd/gfl_R_18_R_50-1x_1x.yaml"),
    Case(_GDETKD, _words(_NO_HEADS + "DISTILL.GDETKD.CKD.WEIGHT 0.0"), "SGFI"),
    Case(_GDETKD, _words(_NO_HEADS + "DISTILL.GDETKD.SGFI.WEIGHT 0.0"), "CKD"),
    Case(_GDETKD),
)


class Costs(NamedTuple):
    """What was measured. Parts go by the names in :data:`PARTS`; "c: ..." are others of c."""

    case: Case
    load: Load
    device: str  # in words
    torch: str  # its version
    seconds: Dict[str, List[float]]  # of every round
    memory: Dict[str, float]  # MiB at the peak, of the parts that train
    syncs: Dict[str, int]  # how often the host waits for a GPU, of the parts that train
    gflops: Dict[str, float]  # of a, b and c, see :func:`d2kd.benchmark.profile.gflops`
    operations: Dict[str, float]  # milliseconds of c beyond a and b; empty if not asked for
    methods: Tuple[str, ...] = ()  # that were at work

    @property
    def on_cpu(self) -> bool:
        """Whether it was measured on a CPU, where the host waits for nothing."""
        return self.device.startswith(_CPU)


def measure(
    case: Case, load: Load, beside: Sequence[Sequence[str]] = (), operations: bool = False
) -> Costs:
    """
    Args:
        case: a recipe; its teacher gets random weights.
        load: what is measured on.
        beside: other changes to the recipe, to be measured as well.
        operations: also find in which of torch's operations the time goes.

    Raises:
        UserError: if the config distils nothing, cannot be built, or is for a device whose clock
            is unknown.
    """
    keep_freed_memory()
    cfg = case.config()
    device = cfg.MODEL.DEVICE
    if not device.startswith(tuple(AMP)):
        raise UserError(f"MODEL.DEVICE is '{device}': cpu and cuda can be measured")
    with EventStorage(cfg.SOLVER.MAX_ITER // 2):  # half-way, when warm-ups are over
        steps = _steps(case, load, beside)
        training = [name for name in steps if name not in FORWARDS]
        for step in steps.values():
            timed(step)
        seconds: Dict[str, List[float]] = {name: [] for name in steps}
        for turn in range(load.rounds):
            first = turn % len(steps)
            for name in [*list(steps)[first:], *list(steps)[:first]]:
                seconds[name].append(timed(steps[name]))
        memory = {name: peak_memory(steps[name], device) for name in training}
        syncs = {name: host_syncs(steps[name], device) for name in training}
        work = {name: gflops(steps[name]) for name in STANDARD_PARTS}
        extra = additional(steps, device, load.rounds) if operations else {}
    threads = f"{_CPU}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device.startswith("cuda") else threads
    methods = tuple(distilled_methods(cfg))
    version = torch.__version__
    return Costs(case, load, where, version, seconds, memory, syncs, work, extra, methods)


def _steps(case: Case, load: Load, beside: Sequence[Sequence[str]]) -> Dict[str, Step]:
    loaded = random_pair(case.as_stock())
    model = random_pair(case.config())
    inputs = random_batch(load, model.family, case.config().MODEL)
    steps = {
        "a": training_step(loaded.student, inputs, load.amp),
        "b": _teacher_forward(loaded, inputs, load.amp),
        "t": _teacher_forward(model, inputs, load.amp),
        "c": training_step(model, inputs, load.amp),
    }
    for opts in beside:
        other = random_pair(case.config(opts))
        steps[f"c: {' '.join(opts)}"] = training_step(other, inputs, load.amp)
    return steps


def random_batch(load: Load, student: Family, heads: CfgNode) -> List[dict]:
    """Images of noise with random boxes, always the same.

    Args:
        student: whose images they are; where it does not say how many classes it detects, objects
            are of the first one.
        heads: the node MODEL, which says whether masks and keypoints are learned.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(load.batch):
        corner = torch.rand(load.boxes, 2, generator=generator) * load.size * 0.6
        size = (0.05 + 0.35 * torch.rand(load.boxes, 2, generator=generator)) * load.size
        instances = Instances((load.size, load.size))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(
            student.num_classes or 1, (load.boxes,), generator=generator
        )
        if heads.MASK_ON:
            corners = instances.gt_boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]]
            instances.gt_masks = PolygonMasks([[polygon] for polygon in corners.numpy()])
        if heads.KEYPOINT_ON:
            points = heads.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            instances.gt_keypoints = Keypoints(_at_centers(instances.gt_boxes, points))
        shape = (len(student.pixels.mean), load.size, load.size)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def _at_centers(boxes: Boxes, points: int) -> Tensor:
    """(N, points, 3), visible all."""
    centers = F.pad(boxes.get_centers(), (0, 1), value=2.0)
    return centers[:, None].expand(-1, points, -1)


def random_pair(cfg: CfgNode) -> TeacherStudent:
    """The model of a recipe, with a teacher of random weights. The same recipe always gives the
    same weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        cfg.DISTILL.TEACHER.WEIGHTS = os.path.join(folder, "teacher.pth")
        save_random_teacher(cfg, cfg.DISTILL.TEACHER.WEIGHTS)
        model = build_model(cfg)
    if not isinstance(model, TeacherStudent):
        raise UserError("DISTILL.METHODS is empty, or all weights are 0: nothing to compare")
    return model.train()


def training_step(model: nn.Module, inputs: List[dict], amp: bool = False) -> Step:
    """Forward, backward and the optimizer's step. The learning rate of 0 keeps the work equal; no
    gradient is left behind."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        with _precision(model.device, amp):
            losses = model(inputs)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _precision(device: torch.device, amp: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, AMP[device.type], enabled=amp)


def _teacher_forward(model: TeacherStudent, inputs: List[dict], amp: bool) -> Callable[[], None]:
    """Runs the teacher alone, as far as the methods of the model read it."""
    ours, theirs = model.active_reads({n: d.terms for n, d in model.distillers.items()})
    with _precision(model.device, amp), Recorder(model.family.observed(ours)) as recorder:
        model.student(inputs)
    sizes = [tuple(x["image"].shape[-2:]) for x in inputs]
    targets = [x["instances"].to(model.device) for x in inputs]
    student = StudentView(model.family, ours, recorder, sizes, targets)

    def forward() -> TeacherView:
        with _precision(model.device, amp):
            teacher_pass = TeacherPass(model.teacher, inputs, theirs)
            teacher_pass.run_backbone(student.images.tensor)
            return teacher_pass.finish(targets)

    asked = _regions_asked(model, student, forward(), targets)
    reads = [read for read in theirs if isinstance(read, Regions)]

    def forward_of_regions() -> None:
        teacher = forward()
        with _precision(model.device, amp):
            for regions, stage in asked:
                for read in reads:
                    if read.stage == stage:
                        teacher.regions(regions, read)

    return forward_of_regions


@torch.no_grad()
def _regions_asked(
    model: TeacherStudent, student: StudentView, teacher: TeacherView, targets: List[Instances]
) -> List[Tuple[RegionSet, int]]:
    """What the methods of the model ask the teacher's box heads for, found by running them."""
    for distiller in model.distillers.values():
        distiller.want(distiller.terms)
        with distiller.random:
            distiller(student, teacher, targets)
    return teacher.asked
