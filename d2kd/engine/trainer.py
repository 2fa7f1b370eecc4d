"""DistillTrainer: Detectron2's ``DefaultTrainer`` for a teacher–student model or a plain one."""

import logging
import os
from collections import OrderedDict
from typing import Any, Dict, List

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from d2kd.data.check import num_classes_of
from d2kd.data.loader import ResumableLoader
from d2kd.errors import UserError, nearest
from d2kd.modeling import TeacherStudent, build_family, build_model

from .checkpoint import StudentCheckpointer
from .hooks import ScheduleHook
from .run_state import RunState

logger = logging.getLogger(__name__)

EVALUATORS = {
    "coco": COCOEvaluator,
    "lvis": LVISEvaluator,
    "pascal_voc": PascalVOCDetectionEvaluator,
}


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """As Detectron2's ``build_optimizer`` does for SGD."""
    params = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


OPTIMIZERS = {"SGD": build_optimizer, "AdamW": _build_adamw}


def _stop_decay(optimizer: torch.optim.Optimizer, parameters: List[nn.Parameter]) -> None:
    """Moves parameters into groups of their own, which differ in that they do not decay."""
    moved = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if id(p) in moved]
        if ours:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
            optimizer.add_param_group({**group, "params": ours, "weight_decay": 0.0})


class DistillTrainer(DefaultTrainer):
    """Trains what the config describes: a student with its teacher, or a plain detector.

    It differs from ``DefaultTrainer`` in what it saves (the bare student), in that a resumed run
    continues exactly, and in the choice of an optimizer.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        self._check_classes()

    def _check_classes(self) -> None:
        """
        Raises:
            UserError: if the data has another number of classes than the student.
        """
        names = self.cfg.DATASETS.TRAIN
        in_data, in_model = num_classes_of(names), build_family(self.student).num_classes
        if in_data is not None and in_data != in_model:
            raise UserError(
                f"DATASETS.TRAIN {tuple(names)} has {in_data} classes, but the student predicts "
                f"{in_model}: set NUM_CLASSES of its head in MODEL"
            )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        logger.info(f"Model:\n{model}")
        return model

    @property
    def bare_model(self) -> nn.Module:
        """The model without its wrapper for distributed training."""
        return getattr(self.model, "module", self.model)

    @property
    def student(self) -> nn.Module:
        """The detector that is trained and saved."""
        model = self.bare_model
        return model.student if isinstance(model, TeacherStudent) else model

    def build_hooks(self) -> List[HookBase]:
        # The checkpointer is replaced here because the hooks keep it.
        model, run_state = (
            self.bare_model,
            RunState(self.student, self.cfg.SOLVER.CHECKPOINT_PERIOD),
        )
        distilled = isinstance(model, TeacherStudent)
        extra = {"distillers": model.distillers} if distilled else {}
        self.checkpointer = StudentCheckpointer(
            self.student, self.cfg.OUTPUT_DIR, trainer=self, run_state=run_state, **extra
        )
        self._run_state = run_state
        hooks = [run_state, ScheduleHook(model)] if distilled else [run_state]
        return hooks + super().build_hooks()

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter:
            self.data_loader.start_iter = self.start_iter
            self._run_state.restore()

    def run_step(self) -> None:
        # The scripted focal loss of Detectron2 is optimised after its first call, which changes
        # the last bits of its gradient: a resumed process would differ from one that went on.
        with torch.jit.optimized_execution(False):
            super().run_step()

    def state_dict(self) -> Dict[str, Any]:
        # Release 0.6 forgets the optimizer.
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        return ResumableLoader(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        name = cfg.SOLVER.OPTIMIZER
        if name not in OPTIMIZERS:
            raise UserError(f"SOLVER.OPTIMIZER is '{name}': {nearest(name, OPTIMIZERS)}")
        optimizer = OPTIMIZERS[name](cfg, model)
        if isinstance(model, TeacherStudent):
            distillers = model.distillers.values()
            _stop_decay(optimizer, [p for d in distillers for p in d.undecayed()])
        return optimizer

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "none")
        if kind not in EVALUATORS:
            raise UserError(
                f"DATASETS.TEST names '{dataset_name}', whose evaluator_type is '{kind}': d2kd "
                f"evaluates {', '.join(EVALUATORS)}"
            )
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        return EVALUATORS[kind](dataset_name, output_dir=folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> OrderedDict:
        # Evaluation in the middle of training leaves the random numbers of training alone.
        with torch.random.fork_rng():
            return super().test(cfg, model, evaluators)
