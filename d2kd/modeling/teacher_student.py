"""TeacherStudent: the meta-architecture that trains a student beside a frozen teacher."""

from typing import Dict, FrozenSet, List, Optional, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from d2kd.methods import Distiller
from d2kd.methods.schedule import TermSchedule

from .build import build_teacher_student_parts
from .families import build_family
from .recorder import Recorder
from .teacher import Teacher
from .views import StudentView

Schedules = Dict[Tuple[str, str], TermSchedule]


@META_ARCH_REGISTRY.register()
class TeacherStudent(nn.Module):
    """A student in training, with the losses of one or more distillation methods.

    In evaluation it is the student and nothing else. ``student`` is a plain Detectron2 detector:
    its ``state_dict`` is what a run saves.

    Attributes:
        student: the detector that is trained; its forward is Detectron2's own.
        teacher: the frozen one; not a child module, see :class:`Teacher`.
        distillers: the methods' modules by name, with the adapters.
        schedules: the weight of every (method, term).
        last_terms: the unweighted values of the last step by (method, term), detached.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Optional[Teacher],
        distillers: Dict[str, Distiller],
        schedules: Schedules,
    ):
        """
        Args:
            student: any detector of a registered family.
            teacher: may be None when there is nothing to distil.
            distillers: by method name.
            schedules: one per (method, term) of all the distillers.
        """
        super().__init__()
        self.student = student
        self.family = build_family(student)
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self.schedules = schedules
        self.last_terms: Dict[Tuple[str, str], Tensor] = {}

    @classmethod
    def from_config(cls, cfg) -> Dict:
        return build_teacher_student_parts(cfg)

    @property
    def device(self) -> torch.device:
        return self.student.device

    def _apply(self, fn, *args, **kwargs):
        """The teacher goes wherever the model is moved."""
        if self.teacher is not None:
            self.teacher.detector._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

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
        iteration = get_event_storage().iter
        active = self._activate(iteration)
        if not active:
            return self._touch_idle(self.student(batched_inputs), active)

        recorder = Recorder(self.family.taps(self.needs(active, "student")))
        image_sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        student = StudentView(self.family, recorder, image_sizes)
        needs = self.needs(active, "teacher")
        teacher = self.teacher.view(batched_inputs, student, needs)

        def teacher_first(*_) -> None:
            """Its widest maps are gone before the student keeps its own for the gradient."""
            if needs:
                teacher.run_backbone()

        with recorder, self.student.backbone.register_forward_pre_hook(teacher_first):
            losses = self.student(batched_inputs)

        targets = [x["instances"].to(self.device) for x in batched_inputs]
        for name in active:
            for term, value in self.distillers[name](student, teacher, targets).items():
                losses[f"loss_{name}_{term}".lower()] = self._weighted(name, term, value, iteration)
        return self._touch_idle(losses, active)

    def _weighted(self, name: str, term: str, value: Tensor, iteration: int) -> Tensor:
        self.last_terms[name, term] = value.detach()
        return self.schedules[name, term].apply(value, iteration)

    def _activate(self, iteration: int) -> Dict[str, FrozenSet[str]]:
        """The terms to compute now, by method; methods without any are left out."""
        active = {}
        for name, distiller in self.distillers.items():
            terms = frozenset(
                t for t in distiller.terms if self.schedules[name, t].active(iteration)
            )
            distiller.activate(terms)
            if terms:
                active[name] = terms
        return active

    def needs(self, active: Dict[str, FrozenSet[str]], side: str) -> FrozenSet[str]:
        """What the active terms read of the student or of the teacher."""
        return frozenset(
            need
            for name, terms in active.items()
            for term in terms
            for need in getattr(self.distillers[name].requires[term], side)
        )

    def _touch_idle(self, losses: Dict[str, Tensor], active: Dict) -> Dict[str, Tensor]:
        """Ties the distillers that do not compute all of their terms to a loss, with gradient 0:
        DistributedDataParallel wants every parameter in every step."""
        idle = [
            parameter.sum()
            for name, distiller in self.distillers.items()
            if active.get(name) != distiller.terms
            for parameter in distiller.parameters()
        ]
        if idle:
            first = next(iter(losses))
            losses[first] = losses[first] + 0.0 * torch.stack(idle).sum()
        return losses
