"""SIGTERM, SIGHUP and Ctrl-C: the step ends, the run is saved, and the process says how to go
on."""

import contextlib
import io
import logging
import os
import shlex
import signal
import sys
from datetime import timedelta
from types import FrameType
from typing import Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch.multiprocessing import get_context

from d2kd.errors import UserError
from d2kd.one_line import exit_status, handled, stop_signals

logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """The run was saved because the process was asked to stop."""


class EvaluationStopped(BaseException):
    """An evaluation was left because the process was asked to stop."""


class Signals:
    """What this process was asked. Signals belong to a process, so there is one of these.

    Attributes:
        received: the number of the first signal, or 0.
    """

    received = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Inside of it the first signal is a request, and the second one ends the process. One of
        several is not ended: whoever started it passes signals on, and ends it if need be."""
        self.received, self._owner = 0, os.getpid()
        with handled(self._receive, stop_signals()):
            yield

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._owner:  # a worker that loads data
            return
        if self.received and number == signal.SIGHUP:  # of a terminal, which comes twice
            return
        if self.received and comm.get_world_size() == 1:
            os._exit(exit_status(number))
        if self.received:
            return
        self.received = number
        if comm.is_main_process():
            with contextlib.suppress(OSError):  # no buffered stream: it may be in use right now
                os.write(2, b"Stopping after this step; once more stops at once\n")


SIGNALS_OF_PROCESS = Signals()


class StopHook(HookBase):
    """Lets all processes of a run agree after each step whether to stop, and stops them. Register
    it after the checkpointer and before evaluation, which the resumed run makes up for."""

    def __init__(self, timeout: float):
        """
        Args:
            timeout: seconds after which a process that does not answer is given up.
        """
        self._timeout = timedelta(seconds=timeout)
        self._group: Optional[dist.ProcessGroup] = None

    def before_train(self) -> None:
        if comm.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def after_step(self) -> None:
        number = self._agreed()
        # After the last step all is saved already, and only an evaluation is to come.
        if number and self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.stop(number)

    def wait_for_all(self) -> None:
        """Returns when every process has come here: none ends another that is still writing."""
        if self._group is not None:
            dist.barrier(self._group)

    def _agreed(self) -> int:
        number = SIGNALS_OF_PROCESS.received
        if self._group is None:
            return number
        asked = torch.tensor([number])
        try:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as e:
            raise UserError(unreachable(e)) from e
        return int(asked)


def unreachable(error: BaseException) -> str:
    """One line on a process of the run that does not answer."""
    return (
        f"another process of this run ended or does not answer ({' '.join(str(error).split())[:80]}"
        "): this one ends without saving; add --resume to go on from the last checkpoint"
    )


class StoppableEvaluator(DatasetEvaluator):
    """An evaluator that is left between two batches when the process is asked to stop. Of several
    processes none leaves: the others would wait for it. What it prints goes to the log."""

    def __init__(self, evaluator: DatasetEvaluator):
        self._evaluator = evaluator

    def reset(self):
        self._evaluator.reset()

    def process(self, inputs, outputs):
        if SIGNALS_OF_PROCESS.received and comm.get_world_size() == 1:
            raise EvaluationStopped
        self._evaluator.process(inputs, outputs)

    def evaluate(self):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            results = self._evaluator.evaluate()
        if printed.getvalue():
            logger.debug(f"Printed by the evaluation:\n{printed.getvalue()}")
        return results


def command_to_resume(argv: Tuple[str, ...] = ()) -> str:
    """The command of this process with ``--resume``."""
    program, *words = argv or sys.argv
    if "--resume" not in words:
        named = [i for i, word in enumerate(words) if word.startswith("--config-file")]
        sub_command = 1 if words[:1] == ["train"] else 0
        words.insert(named[0] if named else sub_command, "--resume")
    # Of "python -m d2kd"; as a script, this file would not find the package that it is part of
    module = os.path.basename(program) == "__main__.py"
    return shlex.join([*_launcher(program), *(["-m", "d2kd"] if module else [program]), *words])


def _launcher(program: str) -> List[str]:
    if dist.is_torchelastic_launched():  # has set these
        machines = os.environ["GROUP_WORLD_SIZE"]
        several = ["--nnodes", machines] if machines != "1" else []
        return ["torchrun", *several, "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
    return ["python"] if program.endswith(".py") else []


@contextlib.contextmanager
def forwarded_signals() -> Iterator[List[int]]:
    """Passes signals on to the processes that this one has started, and ends them at the second.

    Yields:
        the signals so far.
    """
    received: List[int] = []

    def receive(number: int, frame: Optional[FrameType]) -> None:
        if received and number == signal.SIGHUP:  # of a terminal, which comes twice
            return
        children = get_context("spawn").active_children()
        received.append(number)
        for child in children:
            if len(received) == 1:
                child.terminate()
            else:
                child.kill()
        if len(received) > 1:
            os._exit(exit_status(number))

    with handled(receive, stop_signals()):
        yield received
