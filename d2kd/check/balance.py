"""How large the weights of a recipe's terms should be, from a short run."""

import shlex
import statistics
import tempfile
from typing import Dict, List, NamedTuple

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from d2kd.distillation import TeacherStudent
from d2kd.engine import DistillTrainer
from d2kd.engine.logs import set_up_logs
from d2kd.errors import UserError
from d2kd.lazy import python_overrides
from d2kd.methods.core import DISTILLER_REGISTRY, scalar_name


class ProposedWeight(NamedTuple):
    """The weight of one term."""

    key: str  # in the config
    weight: float  # as it is
    ratio: float  # gradient norm at the FPN over the detection losses', with this weight
    proposed: float  # the weight that gives the share that was asked for


def propose_weights(cfg: CfgNode, share: float, steps: int) -> List[ProposedWeight]:
    """Trains some steps from the start of a run, and looks at the gradients of the second half.

    Args:
        cfg: of a recipe; nothing is written to its output folder.
        share: that the gradients of all its terms together should have, relative to the detection
            losses', each term the same.
        steps: how many.

    Returns:
        of every term whose gradient passes the FPN.

    Raises:
        UserError: if nothing is distilled, or no term reaches the FPN in these steps.
    """
    cfg = cfg.clone()
    cfg.defrost()
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    with tempfile.TemporaryDirectory(prefix="d2kd_balance_") as folder:
        cfg.OUTPUT_DIR = folder
        set_up_logs(folder, rank=0)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=False)
        model = trainer.bare_model
        if not isinstance(model, TeacherStudent):
            raise UserError("DISTILL.METHODS is empty, or all weights are 0: nothing to balance")
        ratios = _ratios(trainer, model, steps)
    reached = {key: _at_full_weight(model, key, values) for key, values in ratios.items()}
    reached = {key: ratio for key, ratio in reached.items() if ratio > 0}
    if not reached:
        raise UserError(
            f"no gradient of a term reaches the FPN in {steps} steps: see START_ITER and "
            "WARMUP_ITERS, and take more steps; terms on backbone stages alone have none there"
        )
    return [_proposal(model, key, r, share / len(reached)) for key, r in reached.items()]


def _ratios(trainer: DistillTrainer, model: TeacherStudent, steps: int) -> Dict[tuple, List[tuple]]:
    """The ratios of the second half of the steps, with their iterations, by (method, term)."""
    model.train()
    model.balance_period = 1
    found: Dict[tuple, List[tuple]] = {key: [] for key in model.schedules}
    with EventStorage(0) as storage:
        for iteration in range(steps):
            trainer.step_without_hooks(iteration, storage)
            trainer.scheduler.step()
            latest = storage.latest()
            for method, term in found:
                value, measured = latest.get(scalar_name(method, term, "gradient"), (0, -1))
                if measured == iteration >= steps // 2:
                    found[method, term].append((iteration, value))
    return found


def _at_full_weight(model: TeacherStudent, key: tuple, values: List[tuple]) -> float:
    """The median ratio, without what a schedule made of the weight."""
    schedule = model.schedules[key]
    full = [ratio * schedule.weight / schedule(i) for i, ratio in values if schedule(i)]
    return statistics.median(full) if full else 0.0


def _proposal(model: TeacherStudent, key: tuple, ratio: float, share: float) -> ProposedWeight:
    method, term = key
    weight = model.schedules[key].weight
    name = DISTILLER_REGISTRY.get(method).term_key(term)
    return ProposedWeight(name, weight, ratio, float(f"{weight * share / ratio:.2g}"))


def proposals_text(proposals: List[ProposedWeight], config: str) -> str:
    """A table, and the overrides that set the proposed weights.

    Args:
        proposals: what is proposed.
        config: the file that they are for, in whose syntax the overrides are.
    """
    rows = [[p.key, f"{p.weight:g}", f"{p.ratio:.2f}", f"{p.proposed:g}"] for p in proposals]
    table = tabulate(rows, ["key", "weight", "gradient", "proposed"], disable_numparse=True)
    changes = [str(word) for p in proposals for word in (p.key, p.proposed)]
    return f"{table}\n\n{shlex.join(python_overrides(config, changes))}"
