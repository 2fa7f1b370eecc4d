"""DistillTrainer: Detectron2's ``DefaultTrainer`` for a teacher–student model or a plain one."""

import contextlib
import logging
import os
import signal
from collections import OrderedDict
from typing import Any, Dict, Iterator, List

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from d2kd.checkpoint import (
    PARAMETER_NAMES,
    StudentCheckpointer,
    other_settings,
    refuse_not_finite,
)
from d2kd.data.bad_images import NamingLoader, NamingMapper
from d2kd.data.classes import class_names_of
from d2kd.data.loader import ResumableLoader
from d2kd.distillation import LOG_PERIOD, TeacherStudent, build_model
from d2kd.errors import UserError, reason
from d2kd.layers.random import preserve_rng_state
from d2kd.lazy import is_lazy
from d2kd.model_zoo import FINAL_WEIGHTS
from d2kd.one_line import exit_status

from . import lazy_parts
from .accumulation import accumulated_step
from .averaging import ema_hook
from .evaluators import add_missing_info, build_evaluator
from .failures import as_user_error, keep_quiet_of_user_errors
from .finite import FiniteLosses
from .hooks import CostHook, GradScaleHook, ScheduleHook, best_hook, precise_bn_hook
from .metrics import METRICS_FILE, forget_lines, has_ended, restore_metrics
from .optimizer import build_lr_scheduler, build_optimizer, hyperparameters_kept
from .preflight import refuse_other_classes
from .processes import broadcast_statistics, wrap_ddp
from .progress import ProgressPrinter
from .results import evaluated
from .run_state import RunState, parameter_names
from .scaling import scale_to_processes
from .stopping import (
    SIGNALS_OF_PROCESS,
    EvaluationStopped,
    StopHook,
    StoppableEvaluator,
    Stopped,
    command_to_resume,
)

logger = logging.getLogger(__name__)


class DistillTrainer(DefaultTrainer):
    """Trains what the config describes: a student with its teacher, or a plain detector.

    It differs from ``DefaultTrainer`` in what it saves (the bare student), in that a resumed run
    continues exactly, and in the choice of an optimizer. A Python config (LazyConfig) describes
    optimizer, schedule, data and evaluators itself.
    """

    _failed, _stop_signal = False, 0

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's own gives every process a GPU.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = scale_to_processes(cfg, comm.get_world_size())
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        step_trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step_trainer(wrap_ddp(model), loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        if is_lazy(cfg):
            lazy_parts.set_up_training(cfg, self.model)
        refuse_other_classes(cfg.DATASETS.TRAIN, self.student)
        self.checkpointer = self._build_checkpointer()
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        logger.debug(f"Model:\n{model}")
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

    def _build_checkpointer(self) -> StudentCheckpointer:
        """It saves the student, and beside it what the run goes on from."""
        model, cfg = self.bare_model, self.cfg
        distilled = isinstance(model, TeacherStudent)
        self._run_state = RunState(
            self.student,
            cfg.SOLVER.CHECKPOINT_PERIOD,
            model.random_streams() if distilled else {},
            model.teacher.checksum if distilled else "",
        )
        extra = {"distillers": model.distillers} if distilled else {}
        return StudentCheckpointer(
            self.student,
            cfg.OUTPUT_DIR,
            class_names=class_names_of(cfg.DATASETS.TRAIN),
            keep=cfg.RUN.KEEP_CHECKPOINTS,
            trainer=self,
            run_state=self._run_state,
            **extra,
        )

    def build_hooks(self) -> List[HookBase]:
        """Detectron2's in their order, d2kd's own among them. What another trainer class makes of
        that list is not taken over."""
        model, cfg, is_main = self.bare_model, self.cfg, comm.is_main_process()
        batches, period = cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.CHECKPOINT_PERIOD
        average = ema_hook(cfg, self.student, self._trainer.optimizer, self.checkpointer)
        self._finite = FiniteLosses(model, self._trainer.optimizer, batches)
        self._stop_hook = StopHook(cfg.RUN.TIMEOUT)
        schedule = [ScheduleHook(model)] if isinstance(model, TeacherStudent) else []
        saving = [hooks.PeriodicCheckpointer(self.checkpointer, period)] if is_main else []
        writing = [hooks.PeriodicWriter(self.build_writers(), LOG_PERIOD)] if is_main else []
        self._hooks_after_saving = [
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate),
            *best_hook(cfg, self.checkpointer),
            *writing,
        ]
        return [
            *schedule,
            CostHook(model, batches),
            GradScaleHook(self._trainer),
            *average,
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            *precise_bn_hook(cfg, self.student, self.build_train_loader),
            self._run_state,
            *saving,
            self._stop_hook,
            *self._hooks_after_saving,
        ]

    def _evaluate(self) -> OrderedDict:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def build_writers(self) -> List[EventWriter]:
        stock = [w for w in super().build_writers() if not isinstance(w, CommonMetricPrinter)]
        self._writers = [ProgressPrinter(self.max_iter), *stock]
        return self._writers

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        source = self.checkpointer.get_checkpoint_file() or self.cfg.MODEL.WEIGHTS
        refuse_not_finite(self.student, self.checkpointer.weights_key, source)
        if len(set(comm.all_gather(self.start_iter))) > 1:
            raise UserError(
                f"OUTPUT_DIR is '{self.cfg.OUTPUT_DIR}', where not every process finds the same "
                "checkpoint to resume: give a folder that all machines share"
            )
        different = other_settings(self.checkpointer.meta, self.student, self.cfg.INPUT.FORMAT)
        if different:  # training may start from such a file, but hardly wants to
            logger.warning(f"Training starts from {source}, but {different}")
        if self.start_iter:
            self.data_loader.start_iter = self.start_iter * self.cfg.SOLVER.ACCUMULATION_STEPS
            self._run_state.restore()

    def refuse_other_teacher(self) -> None:
        """
        Raises:
            UserError: if the run that is resumed had a teacher with other weights.
        """
        now, before = self._run_state.teacher, self._run_state.saved_teacher
        if now != before:
            raise UserError(
                f"the run in '{self.cfg.OUTPUT_DIR}' had a teacher with the checksum "
                f"'{before or 'none'}', this one has '{now or 'none'}': give the same weights, or "
                "another OUTPUT_DIR, or --force-resume to go on with the new ones"
            )

    def is_finished(self) -> bool:
        """Whether the run that is resumed has done all steps and the evaluation after them."""
        return self._final_is_saved() and has_ended(self.cfg.OUTPUT_DIR, self.max_iter)

    def _final_is_saved(self) -> bool:
        saved = os.path.basename(self.checkpointer.get_checkpoint_file())
        return self.start_iter >= self.max_iter and saved == FINAL_WEIGHTS

    def train(self) -> OrderedDict:
        keep_quiet_of_user_errors()
        try:
            with SIGNALS_OF_PROCESS.caught():
                return super().train()
        except EvaluationStopped:  # the last one
            self._end("all steps are done and saved")
        except Stopped:
            self._end(f"{self.iter + 1} of {self.max_iter} steps are done and saved")

    def _end(self, state: str) -> None:
        number = self._stop_signal or SIGNALS_OF_PROCESS.received
        if comm.is_main_process():
            logger.warning(
                f"Stopped by {signal.Signals(number).name}: {state} in '{self.cfg.OUTPUT_DIR}'; "
                f"go on with: {command_to_resume()}"
            )
        raise SystemExit(exit_status(number))

    def before_train(self) -> None:
        super().before_train()
        if self.start_iter:
            self._finish_saved_step()
        elif comm.is_main_process():  # of a run that saved nothing
            forget_lines(os.path.join(self.cfg.OUTPUT_DIR, METRICS_FILE), -1)

    def _finish_saved_step(self) -> None:
        """What comes after saving in a step, evaluation and metrics, is made up for."""
        folder, done = self.cfg.OUTPUT_DIR, self.start_iter - 1
        self.iter = self.storage.iter = done
        writers = getattr(self, "_writers", [])
        restore_metrics(folder, done, self._run_state.scalars, self.storage, writers)
        with self._errors_explained():
            self._save_final(done)
            for hook in self._hooks_after_saving:
                hook.after_step()

    def _save_final(self, iteration: int) -> None:
        """A run whose end was moved to where it is has not been saved as finished."""
        if self.start_iter >= self.max_iter and not self._final_is_saved():
            self._run_state.gather()
            self.checkpointer.save(os.path.splitext(FINAL_WEIGHTS)[0], iteration=iteration)

    def run_step(self) -> None:
        # Optimising Detectron2's scripted focal loss after its first call changes the last bits of
        # its gradient: on a CPU, where steps repeat exactly, a resumed process would differ.
        optimized = self.cfg.MODEL.DEVICE.startswith("cuda")
        with torch.jit.optimized_execution(optimized), self._errors_explained():
            self._run_finite_step()

    def step_without_hooks(self, iteration: int, storage: EventStorage) -> None:
        """One step outside of :meth:`train`: no hook logs, saves or schedules anything.

        Args:
            iteration: which one it is, for the schedules of the losses.
            storage: the one that is open, for what the step logs.
        """
        self.storage, self.iter = storage, iteration
        storage.iter = iteration
        self.run_step()

    def _run_finite_step(self) -> None:
        try:
            self._take_step()
            self._finite.check()  # mixed precision skips the optimizer's step
        except UserError:
            raise
        except Exception as e:
            self._finite.check()
            origin = self._finite.origin()
            if origin is None and isinstance(e, FloatingPointError):  # Detectron2's, of the mean
                origin = "the losses of this process are finite, those of another one are not"
            if origin is None:
                raise
            raise UserError(f"{reason(e)}: {origin}") from e

    def _take_step(self) -> None:
        batches = self.cfg.SOLVER.ACCUMULATION_STEPS
        if batches == 1:
            super().run_step()
        else:
            self._trainer.iter = self.iter
            accumulated_step(self._trainer, batches)

    def after_step(self) -> None:
        with self._errors_explained():
            super().after_step()

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        """What the user can fix is told as such, with the iteration in which it happened."""
        try:
            with as_user_error(self.cfg.OUTPUT_DIR):
                yield
        except EvaluationStopped:
            self.stop(SIGNALS_OF_PROCESS.received)
        except UserError as e:
            self._failed = True
            raise UserError(f"iteration {self.iter}: {e}") from e

    def after_train(self) -> None:
        if self.iter < self.max_iter:  # Detectron2's hook evaluates also if the last step failed
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        try:
            with as_user_error(self.cfg.OUTPUT_DIR):
                super().after_train()
        except UserError:
            if not self._failed:  # else it has been said what happened to the run
                raise

    def stop(self, signal_number: int) -> None:
        """Saves the run as it is after this step, and ends training.

        Args:
            signal_number: the reason.
        """
        self._stop_signal = signal_number
        if (self.iter + 1) % self.cfg.SOLVER.CHECKPOINT_PERIOD:
            self._run_state.gather()
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
        self._stop_hook.wait_for_all()
        raise Stopped

    def state_dict(self) -> Dict[str, Any]:
        # Release 0.6 forgets the optimizer.
        state = super().state_dict()
        state.get("hooks", {}).pop("RunState", None)  # saved beside this
        return {
            **state,
            "_trainer": self._trainer.state_dict(),
            PARAMETER_NAMES: parameter_names(self.bare_model, self._trainer.optimizer),
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if state_dict[PARAMETER_NAMES] != parameter_names(self.bare_model, self._trainer.optimizer):
            raise UserError(
                "the checkpoint to resume was written with other trained parameters: give the "
                "config of its run, or another OUTPUT_DIR"
            )
        scaler = getattr(self._trainer, "grad_scaler", None)
        if scaler is not None:  # the run may have been in full precision so far
            state_dict["_trainer"].setdefault("grad_scaler", scaler.state_dict())
        with hyperparameters_kept(self._trainer.optimizer, self.scheduler):
            super().load_state_dict(state_dict)
            self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        return lazy_parts.build_train_loader(cfg) if is_lazy(cfg) else ResumableLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> NamingLoader:
        if is_lazy(cfg):
            return lazy_parts.build_test_loader(cfg, dataset_name)
        mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
        return NamingLoader(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        build = lazy_parts.build_optimizer if is_lazy(cfg) else build_optimizer
        return build(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        build = lazy_parts.build_lr_scheduler if is_lazy(cfg) else build_lr_scheduler
        return build(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        build = lazy_parts.build_evaluator if is_lazy(cfg) else build_evaluator
        return build(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> OrderedDict:
        broadcast_statistics(model)
        # Evaluation in the middle of training leaves the random numbers of training alone.
        with preserve_rng_state():
            if evaluators is None:
                evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
            add_missing_info(evaluators)
            stoppable = [StoppableEvaluator(evaluator) for evaluator in evaluators]
            results = super().test(cfg, model, stoppable)
        if comm.is_main_process():
            logger.info(evaluated(cfg.DATASETS.TEST, results))
        return results
