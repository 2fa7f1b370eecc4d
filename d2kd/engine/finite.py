"""A loss that is not finite: which term, which level, and where it began."""

from collections import deque
from typing import Any, Deque, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2kd.checkpoint import first_not_finite
from d2kd.distillation import TeacherStudent
from d2kd.errors import UserError
from d2kd.methods.core import loss_name


class _Pass(NamedTuple):
    """A forward pass of the model in training."""

    inputs: Tuple
    half: Optional[torch.dtype]  # of mixed precision, if it ran in that
    losses: Dict[str, Tensor]
    terms: Dict[Tuple[str, str], Tensor]  # of its methods, by level


class FiniteLosses:
    """Watches the losses of a model in training. On every process, before the optimizer's step, it
    stops the run if one is not finite, and looks for the first tensor that is not.

    It looks no sooner: Detectron2 reads the losses from the device after the backward pass, and one
    more wait before it would keep a GPU idle.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: int = 1):
        """
        Args:
            model: without its wrapper for distributed training.
            optimizer: of the training.
            batches: passes of the model in a step.
        """
        self._model = model
        self._passes: Deque[_Pass] = deque(maxlen=batches)
        self._looking = False
        self._alone = comm.get_world_size() == 1
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)
        optimizer.register_step_pre_hook(lambda *args: self.check())

    def _before(self, model: nn.Module, inputs: Tuple) -> None:
        if model.training and not self._looking:
            self._passes.append(_Pass(inputs, _half(model), {}, {}))

    def _after(self, model: nn.Module, inputs: Tuple, losses: Any) -> None:
        if self._looking or not model.training or not isinstance(losses, Mapping):
            return
        done = self._passes[-1]
        done.losses.update({name: loss.detach() for name, loss in losses.items()})
        done.terms.update(getattr(model, "last_terms", {}))

    def check(self) -> None:
        """Looks at the losses since the last time, and forgets them.

        Raises:
            UserError: if a loss of the last step is not finite.
        """
        losses = [loss for done in self._passes for loss in done.losses.values()]
        if not losses:
            return
        if torch.stack([loss.float().sum() for loss in losses]).isfinite().all():
            unfinished = [done for done in self._passes if not done.losses]
            self._passes.clear()
            self._passes.extend(unfinished)  # one may have ended in an error
            return
        wrong = ", ".join(
            f"{name} is {loss.item()}{_levels(name, done.terms)}"
            for done in self._passes
            for name, loss in done.losses.items()
            if not loss.isfinite()
        )
        raise UserError(f"{wrong}: {self.origin() or self._unknown_origin()}")

    def _unknown_origin(self) -> str:
        if self._alone:
            found = "the outputs of all modules are finite, it began in the loss itself"
        else:
            found = "images and weights are finite (a run of one process says which module is not)"
        return f"{found}; lower SOLVER.BASE_LR or the term's WEIGHT"

    def origin(self) -> Optional[str]:
        """Which part of the last step was the first that is not finite; None if all is. A detector
        may stop with any error at NaN or infinite values, before it comes to a loss.

        Among several processes modules are not looked at: it takes a step of all of them, and the
        others wait elsewhere.
        """
        for done in self._passes:
            for name in _images_not_finite(done.inputs):
                return f"image {name} is not finite; repair it or its mapper"
        sides = _sides(self._model)
        for side, module in sides.items():
            # What a method has not measured yet is NaN in its buffers
            state = dict(module.named_parameters()) if side == "method" else module.state_dict()
            tensor = first_not_finite(state)
            if tensor:
                return _blamed(side, tensor)
        if not self._alone:
            return None
        self._looking = True
        outputs = (_first_output(self._model, done, sides) for done in self._passes)
        first = next(filter(None, outputs), None)
        if first is None:
            return None
        side, name = first
        advice = (
            "set DISTILL.TEACHER.PRECISION to float32, or check the teacher's config and weights"
            if side == "teacher"
            else "lower SOLVER.BASE_LR, or add SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
        if side != "teacher" and any(done.half for done in self._passes):
            advice += " or SOLVER.AMP.ENABLED False"
        return f"the {side}'s output was the first that is not finite (module {name}); {advice}"


def _levels(loss: str, terms: Mapping[Tuple[str, str], Tensor]) -> str:
    """The FPN levels of a term whose values are not finite."""
    for (method, term), values in terms.items():
        if loss == loss_name(method, term) and values.dim() == 1:
            levels = (~values.isfinite()).nonzero().flatten().tolist()
            return f" (on levels {levels} of {len(values)}, finest first)" if levels else ""
    return ""


def _images_not_finite(inputs: Tuple) -> Iterator[str]:
    for entry in inputs[0] if inputs else ():
        if not torch.as_tensor(entry["image"]).isfinite().all():
            yield str(entry.get("file_name", "without a name"))


def _sides(model: nn.Module) -> Dict[str, nn.Module]:
    if not isinstance(model, TeacherStudent):
        return {"student": model}
    methods = model.distillers
    return {"teacher": model.teacher.detector, "student": model.student, "method": methods}


def _half(model: nn.Module) -> Optional[torch.dtype]:
    device = _device_type(model)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _blamed(side: str, tensor: str) -> str:
    if side == "teacher":
        return f"the teacher's {tensor} is not finite; give other DISTILL.TEACHER.WEIGHTS"
    return (
        f"the {side}'s {tensor} is not finite since the step before, whose gradient was not; lower "
        "SOLVER.BASE_LR, or add SOLVER.CLIP_GRADIENTS.ENABLED True, and go on with --force-resume"
    )


def _first_output(
    model: nn.Module, done: _Pass, sides: Dict[str, nn.Module]
) -> Optional[Tuple[str, str]]:
    """Runs a step again and looks at the output of every module, in the order of the run.

    Returns:
        side and name of the first module whose output is not finite.
    """
    found: List[Tuple[str, str]] = []

    def look(side: str, name: str):
        def hook(module: nn.Module, args: Tuple, output: Any) -> None:
            if not found and not all(t.isfinite().all() for t in _tensors(output)):
                found.append((side, name or type(module).__name__))

        return hook

    handles = [
        module.register_forward_hook(look(side, name))
        for side, detector in sides.items()
        for name, module in detector.named_modules()
        if module is not model
    ]
    try:
        mixed = torch.autocast(_device_type(model), done.half, enabled=done.half is not None)
        with EventStorage(0), torch.no_grad(), mixed:
            model(*done.inputs)
    except Exception:  # what is not finite may end in any error; what was seen before counts
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
