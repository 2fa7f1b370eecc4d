"""A run that nobody trained: its folder, with a detector of random weights."""

import torch
from toys import STUDENTS, config

from d2kd.checkpoint import write_student_yaml
from d2kd.distillation import build_detector
from d2kd.engine.run_config import write_run_config
from d2kd.engine.trained_run import open_run

KINDS = {**STUDENTS, "PaperFCOS": "shapes/baselines/paper_fcos_tiny.yaml"}
# Each kind's node in MODEL
NODES = {"RetinaNet": "RETINANET", "PaperFCOS": "FCOS", "FasterRCNN": "ROI_HEADS"}
CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
# Untrained, these give nearly equal scores, whose order the last bits of a number decide
TWO_STAGE_SCORES = (
    "proposal_generator.rpn_head.objectness_logits.weight",
    "roi_heads.box_predictor.cls_score.weight",
)


def with_threshold(kind, threshold):
    """Overrides: random weights score about 0.01, so that 0.012 keeps some, 0.9 nothing."""
    return [f"MODEL.{NODES.get(kind, kind)}.SCORE_THRESH_TEST", threshold]


def made_up_run(folder, kind, opts=(), threshold=0.012, seed=0, classes=CLASSES):
    """Writes a run's folder and opens it."""
    folder.mkdir(parents=True)
    opts = [*with_threshold(kind, threshold), *opts, "OUTPUT_DIR", str(folder)]
    cfg = config(KINDS.get(kind, kind), ["INPUT.MIN_SIZE_TEST", 96, *opts])
    torch.manual_seed(seed)
    state = build_detector(cfg).state_dict()
    for name in TWO_STAGE_SCORES:
        if name in state:
            state[name] *= 30
    content = {"model": state, "classes": list(classes)}
    torch.save(content, folder / "model_final.pth")
    write_run_config(cfg)
    write_student_yaml(cfg)
    return open_run(str(folder))
