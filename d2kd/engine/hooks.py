"""Hooks of the distillation trainer."""

import logging

from detectron2.engine import HookBase

from d2kd.modeling import TeacherStudent

logger = logging.getLogger(__name__)


class ScheduleHook(HookBase):
    """Announces when a loss term starts and stops, and logs the weight of every term and its
    value per FPN level, as ``distill/<method>_<term>/...``."""

    def __init__(self, model: TeacherStudent, period: int = 20):
        """
        Args:
            model: the model in training.
            period: iterations between two logs; reading values from the device costs time.
        """
        self._model = model
        self._period = period
        self._active = None

    def before_step(self) -> None:
        iteration = self.trainer.iter
        active = {key for key, s in self._model.schedules.items() if s.active(iteration)}
        if active != self._active:
            names = ", ".join(sorted("_".join(key).lower() for key in active)) or "none"
            logger.info(f"Distillation terms from iteration {iteration} on: {names}")
            self._active = active

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self._period:
            return
        storage = self.trainer.storage
        for (method, term), schedule in self._model.schedules.items():
            prefix = f"distill/{method}_{term}".lower()
            storage.put_scalar(f"{prefix}/weight", schedule(iteration), smoothing_hint=False)
            value = self._model.last_terms.get((method, term))
            if value is not None and value.dim() == 1 and schedule.active(iteration):
                for level, number in enumerate(value.tolist()):
                    storage.put_scalar(f"{prefix}/level{level}", number)
