"""What a run saves: the student as a plain Detectron2 file, and beside it what resuming needs."""

import os
from typing import Any, Dict

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from d2kd.config import needs_d2kd, student_config
from d2kd.errors import UserError
from d2kd.modeling.weights import reading

STUDENT_YAML = "student.yaml"
FINAL = "model_final.pth"


class StudentCheckpointer(DetectionCheckpointer):
    """Saves and loads the bare student under ``model``. Stock Detectron2 reads that file and
    ignores the other keys: ``distillers`` (adapters), ``trainer``, ``run_state``."""

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        with reading(
            path, "the checkpoint to resume" if self.has_checkpoint() else "MODEL.WEIGHTS"
        ):
            return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        unfilled = {*incompatible.missing_keys, *(n for n, *_ in incompatible.incorrect_shapes)}
        if unfilled.issuperset(self.model.state_dict()):
            raise UserError(
                "MODEL.WEIGHTS fills nothing of the student: give a file of the same architecture "
                "or backbone, or '' to train from scratch"
            )
        return incompatible


def refuse_finished_run(output_dir: str) -> None:
    """
    Raises:
        UserError: if the folder holds a run, finished or not, that a new one would overwrite.
    """
    for name, state in ((FINAL, "a finished run"), ("last_checkpoint", "an unfinished run")):
        if PathManager.exists(os.path.join(output_dir, name)):
            raise UserError(
                f"OUTPUT_DIR '{output_dir}' holds {state} ({name}): add --resume to continue it, "
                "or give another OUTPUT_DIR"
            )


def write_student_yaml(cfg: CfgNode) -> None:
    """Writes the student's own config beside its weights, on the main process."""
    if not comm.is_main_process():
        return
    header = f"# The student of this run as a plain detector; its weights are in {FINAL}\n"
    if needs_d2kd(cfg):
        header += (
            "# Detectron2 has no such architecture or backbone in YAML: import d2kd.modeling and\n"
            "# call d2kd.config.add_distill_config(cfg) before this file is read\n"
        )
    with PathManager.open(os.path.join(cfg.OUTPUT_DIR, STUDENT_YAML), "w") as f:
        f.write(header + student_config(cfg).dump())
