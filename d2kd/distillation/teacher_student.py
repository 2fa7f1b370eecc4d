"""TeacherStudent: the meta-architecture that trains a student beside a frozen teacher."""

from collections import deque
from typing import Deque, Dict, FrozenSet, List, Optional, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from d2kd.checkpoint import StudentCheckpointer
from d2kd.errors import UserError
from d2kd.layers import RandomStream, as_float, parameters_reached
from d2kd.methods import Distiller
from d2kd.methods.core import Terms, TermSchedule, check_returned, loss_name, scalar_name
from d2kd.views import Read, Reads, Recorder, StudentView, build_family

from .balance import gradient_ratios
from .build import build_teacher_student_parts
from .teacher import Teacher, TeacherPass
from .timing import Stopwatch

Schedules = Dict[Tuple[str, str], TermSchedule]

# Iterations between two logs, as in Detectron2: reading values makes the host wait for the device.
LOG_PERIOD = 20
# Between two logs of gradient ratios: one costs as much as the heads' part of the backward pass.
BALANCE_PERIOD = 100


@META_ARCH_REGISTRY.register()
class TeacherStudent(nn.Module):
    """A student in training, with the losses of one or more distillation methods.

    In evaluation it is the student and nothing else. ``student`` is a plain Detectron2 detector:
    its ``state_dict`` is what a run saves.

    Attributes:
        student: the detector that is trained; its forward is Detectron2's own.
        family: the student's.
        teacher: the frozen one; not a child module, see :class:`Teacher`.
        distillers: the methods' modules by name, with the adapters.
        reads: what every (method, term) reads of student and teacher.
        schedules: the weight of every (method, term).
        last_terms: the unweighted values of the last step by (method, term), detached.
        step_times: of the last steps that distilled, the time of "teacher" and "distillation".
        balance_period: iterations between two logs of :func:`gradient_ratios`.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher,
        distillers: Dict[str, Distiller],
        reads: Dict[Tuple[str, str], Reads],
        schedules: Schedules,
    ):
        """
        Args:
            student: any detector of a registered family.
            teacher: the frozen one.
            distillers: by method name.
            reads, schedules: one per (method, term) of all the distillers.
        """
        super().__init__()
        self.student = student
        self.family = build_family(student)
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self.reads = reads
        self.schedules = schedules
        self.last_terms: Dict[Tuple[str, str], Tensor] = {}
        self.step_times: Deque[Stopwatch] = deque(maxlen=LOG_PERIOD)
        self.balance_period = BALANCE_PERIOD
        # Of the distillers, since the last step of the optimizer
        self._idle: Optional[List[nn.Parameter]] = None

    @classmethod
    def from_config(cls, cfg) -> Dict:
        return build_teacher_student_parts(cfg)

    @property
    def device(self) -> torch.device:
        return self.student.device

    def _apply(self, fn, *args, **kwargs):
        """The teacher goes wherever the model is moved."""
        self.teacher.detector._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def random_streams(self) -> Dict[str, RandomStream]:
        """Where random numbers are drawn beside the student's own: what resuming has to save."""
        streams = {name: distiller.random for name, distiller in self.distillers.items()}
        return {**streams, "teacher": self.teacher.random}

    def forward(self, batched_inputs: List[Dict]):
        """
        Args:
            batched_inputs: as for the student.

        Returns:
            in training, the student's losses and one ``loss_<method>_<term>`` per term, weighted;
            in evaluation, the student's detections.
        """
        if not self.training:
            return self.student(batched_inputs)
        self.last_terms = {}
        storage = get_event_storage()
        active = self.active_terms(storage.iter)
        if not active:
            return self._touch_idle(self.student(batched_inputs), {}, active)

        given, batched_inputs = batched_inputs, batch_to_device(batched_inputs, self.device)
        watch = Stopwatch(self.device)
        self.step_times.append(watch)
        ours, theirs = self.active_reads(active)
        teacher_pass = TeacherPass(self.teacher, batched_inputs, theirs)
        # The teacher's backbone runs just before the student's: its widest maps are gone before the
        # student keeps its own for the gradient.
        run_backbone = watch.part("teacher")(teacher_pass.run_backbone)
        recorder = Recorder(self.family.observed(ours), self.family.backbone, run_backbone)
        with recorder:
            own = self.student(self._for_student(given, batched_inputs, storage.iter))

        targets = [x["instances"] for x in batched_inputs]
        sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        student = StudentView(self.family, ours, recorder, sizes, targets)
        with watch.part("teacher"):
            teacher = teacher_pass.finish(targets)
        distilled: Dict[str, Tensor] = {}
        for name, terms in active.items():
            distiller = self.distillers[name]
            distiller.want(terms)
            with watch.part("distillation"), distiller.random:
                values = distiller(student, teacher, targets)
            check_returned(distiller, values, terms)
            distilled.update(self._weighted(name, values, storage.iter))
            _log_diagnostics(name, values, storage)
        if (storage.iter + 1) % self.balance_period == 0:
            self._log_balance(own, distilled, list(student.levels.values()), storage)
        return self._touch_idle(own, distilled, active)

    def _for_student(self, given: List[Dict], on_device: List[Dict], iteration: int) -> List[Dict]:
        """The inputs on the device; the ground truth as it was given in a step in which Detectron2
        draws it, which it can do on a CPU alone."""
        period = getattr(self.student, "vis_period", 0)
        if not period or iteration % period:
            return on_device
        pairs = zip(on_device, given)
        return [{**ours, "instances": x["instances"]} for ours, x in pairs]

    def active_terms(self, iteration: int) -> Dict[str, FrozenSet[str]]:
        """The terms to compute at an iteration, by method; methods without any are left out."""
        active = {
            name: frozenset(t for t in distiller.terms if self.schedules[name, t].active(iteration))
            for name, distiller in self.distillers.items()
        }
        return {name: terms for name, terms in active.items() if terms}

    def active_reads(
        self, active: Dict[str, FrozenSet[str]]
    ) -> Tuple[FrozenSet[Read], FrozenSet[Read]]:
        """What some terms, by method, read of the student and of the teacher."""
        reads = [self.reads[name, term] for name, terms in active.items() for term in terms]
        return (
            frozenset(read for r in reads for read in r.student),
            frozenset(read for r in reads for read in r.teacher),
        )

    def forget_idle(self) -> None:
        """Drops the gradients, 0, of what had nothing to learn since the optimizer's last step: to
        be called before its next one, whose decay would shrink what has not begun to learn."""
        for parameter in self._idle or ():
            parameter.grad = None
        self._idle = None

    def _weighted(self, name: str, values: Dict[str, Tensor], iteration: int) -> Dict[str, Tensor]:
        losses = {}
        for term, value in values.items():
            self.last_terms[name, term] = value.detach()
            weighted = self.schedules[name, term].apply(value, iteration)
            losses[loss_name(name, term)] = weighted
        return losses

    def _log_balance(
        self,
        own: Dict[str, Tensor],
        distilled: Dict[str, Tensor],
        levels: List[Tensor],
        storage: EventStorage,
    ) -> None:
        """Logs the :func:`gradient_ratios` of the terms of this step."""
        ratios = gradient_ratios(sum(own.values()), distilled, levels)
        if ratios:
            terms = self.last_terms
            _log({scalar_name(*key, "gradient"): ratios[loss_name(*key)] for key in terms}, storage)

    def _touch_idle(
        self, own: Dict[str, Tensor], distilled: Dict[str, Tensor], active: Dict
    ) -> Dict[str, Tensor]:
        """All losses of a step. What of the distillers none of them depends on, where not all terms
        are active, is tied to one with gradient 0: DistributedDataParallel wants every parameter in
        every step."""
        losses = {**own, **distilled}
        waiting = [d for name, d in self.distillers.items() if active.get(name) != d.terms]
        used = parameters_reached(distilled.values()) if waiting else set()
        idle = [p for d in waiting for p in d.parameters() if p not in used]
        if idle:
            first = next(iter(losses))
            losses[first] = losses[first] + 0.0 * torch.stack([p.sum() for p in idle]).sum()
        # The optimizer's step may follow several passes
        before = set(idle if self._idle is None else self._idle)
        self._idle = [p for p in idle if p in before]
        return losses


def batch_to_device(batched_inputs: List[Dict], device: torch.device) -> List[Dict]:
    """Images and ground truth on a device, once for student, teacher and methods; the host does not
    wait for the images to arrive.

    Args:
        batched_inputs: as Detectron2's mapper gives them; not changed.
        device: of the detectors.
    """
    # Boxes first: the host waits for their copies, and these for all that was begun before them
    instances = [x["instances"].to(device) for x in batched_inputs]
    return [
        {**x, "image": _image_to_device(x["image"], device), "instances": boxes}
        for x, boxes in zip(batched_inputs, instances)
    ]


def _image_to_device(image: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not image.is_cuda:
        image = image.pin_memory()  # from other memory, the copy waits
    return image.to(device, non_blocking=True)


def _log_diagnostics(method: str, values: Dict[str, Tensor], storage: EventStorage) -> None:
    """Logs what a distiller can say of its step, now and then."""
    if isinstance(values, Terms) and (storage.iter + 1) % LOG_PERIOD == 0:
        for term, diagnostics in values.diagnostics.items():
            _log({scalar_name(method, term, k): v for k, v in diagnostics().items()}, storage)


def _log(scalars: Dict[str, Tensor], storage: EventStorage) -> None:
    """Logs scalars by name. The host waits once for all of them."""
    if scalars:
        numbers = torch.stack([as_float(x.detach()).reshape(()) for x in scalars.values()]).tolist()
        storage.put_scalars(smoothing_hint=False, **dict(zip(scalars, numbers)))


def fill_from_run(model: TeacherStudent, path: str) -> None:
    """Reads student and adapters of a checkpoint.

    Raises:
        UserError: if the file holds none, or others.
    """
    if not path:
        raise UserError("MODEL.WEIGHTS is '': give a checkpoint of the recipe's run")
    checkpointer = StudentCheckpointer(model.student)
    saved = checkpointer.load(path)
    if checkpointer.unfilled or "distillers" not in saved:
        raise UserError(f"{path} does not hold the student and the adapters of this recipe")
    try:
        model.distillers.load_state_dict(saved["distillers"])
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the adapters of this recipe") from error
