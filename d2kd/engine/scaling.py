"""The linear rule: a run on another number of processes than its recipe was written for."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from d2kd.errors import UserError
from d2kd.schema import get_value, leaves, set_value

# What Detectron2 scales and rounds, if need be to 0
_PERIODS = ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")
# What of a term counts iterations
_ITERATIONS = (".WARMUP_ITERS", ".START_ITER", ".STOP_ITER")


def scale_to_processes(cfg: CfgNode, count: int) -> CfgNode:
    """Scales a config with ``SOLVER.REFERENCE_WORLD_SIZE`` to a number of processes: the solver as
    Detectron2 does, and the iterations of every distillation term likewise.

    Args:
        cfg: of a run.
        count: processes that train.

    Returns:
        the same config if there is nothing to scale, else a changed copy.

    Raises:
        UserError: if the batch cannot be shared by the processes that the config is written for.
    """
    reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference not in (0, count) and (reference < 0 or batch % reference):
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, of which SOLVER.IMS_PER_BATCH, {batch}, "
            "is no multiple: give the number of GPUs that the config is written for, or 0"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, count)
    if scaled is cfg:
        return cfg
    factor = cfg.SOLVER.REFERENCE_WORLD_SIZE / count
    frozen = scaled.is_frozen()
    scaled.defrost()
    # 0 means never or at once; what is not does not become that
    for key in _PERIODS:
        set_value(scaled, key, max(get_value(scaled, key), min(get_value(cfg, key), 1)))
    for key, value in list(leaves(scaled.DISTILL)):
        if key.endswith(_ITERATIONS):
            set_value(scaled.DISTILL, key, max(round(value * factor), min(value, 1)))
    if frozen:
        scaled.freeze()
    return scaled
