"""How long training will take on this machine, from a step of one image."""

import statistics

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from d2kd.benchmark.measuring import Load, random_batch, random_pair, training_step
from d2kd.benchmark.profile import timed
from d2kd.distillation import build_detector
from d2kd.views import build_family

_STEPS = 2  # timed, after one that is not
_ASPECT = 4 / 3  # width over height of a usual photograph


def seconds_of_training(cfg: CfgNode, processes: int) -> float:
    """
    Args:
        cfg: of a run, with or without a teacher; weights are random here.
        processes: that share its images.
    """
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = ""
    side = round(statistics.median(cfg.INPUT.MIN_SIZE_TRAIN) * _ASPECT**0.5)
    load = Load(size=side, batch=1)
    with EventStorage(cfg.SOLVER.MAX_ITER // 2):
        model = random_pair(cfg) if cfg.DISTILL.METHODS else build_detector(cfg).train()
        student = model.student if cfg.DISTILL.METHODS else model
        batch = random_batch(load, build_family(student), cfg.MODEL)
        step = training_step(model, batch, cfg.SOLVER.AMP.ENABLED)
        timed(step)
        per_image = min(timed(step) for _ in range(_STEPS))
    images = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATION_STEPS
    return per_image * images * cfg.SOLVER.MAX_ITER / processes


def in_words(seconds: float) -> str:
    """A duration in its largest fitting unit, such as "about 3 h"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds:.0f} s"
