#!/usr/bin/env python
"""How often a teacher and the ground truth disagree on what an anchor shows.

    python tools/disagreement.py shapes/mimicking/retinanet_tiny.yaml --batches 50 \\
        DISTILL.TEACHER.WEIGHTS output/shapes/baselines/retinanet_tiny_teacher/model_0000449.pth

Two shares, on images of the training set; ignored anchors do not count:

- of the anchors that learn an object, those for which the teacher scores another class highest;
- of all pairs of an anchor and a class that either calls an object - the student's own assignment,
  or the teacher with a score of at least 0.5 - those that only one of them does.
"""

import argparse
from typing import List, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.utils.events import EventStorage

from d2kd.config import read_config
from d2kd.distillation import TeacherStudent, build_model
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError
from d2kd.layers import as_float
from d2kd.views import StudentView, TeacherView

SCORE = 0.5


class Counts(NamedTuple):
    """Numbers of anchors, or of pairs of an anchor and a class, that are an object."""

    truth: int  # to the ground truth
    teacher: int  # to the teacher, by its score
    both: int
    other_class: int  # to the ground truth, where the teacher scores another class highest

    @property
    def share(self) -> float:
        """Of what either calls an object, that only one does; 0 if there is nothing."""
        either = self.truth + self.teacher - self.both
        return 1 - self.both / either if either else 0.0

    @property
    def share_of_other_classes(self) -> float:
        """Of the objects of the ground truth; 0 if there is none."""
        return self.other_class / self.truth if self.truth else 0.0


def count(student: StudentView, teacher: TeacherView) -> Counts:
    """Of one batch; both dense heads have the same anchors."""
    anchors, head = student.assignment, teacher.family.dense_head
    levels = [permute_to_N_HWA_K(x, head.num_classes) for x in teacher.predictions.logits]
    logits = torch.cat(levels, dim=1)
    valid = anchors.valid[..., None]
    thought = (as_float(logits).sigmoid() >= SCORE) & valid  # (N, R, K)
    labels = anchors.labels.clamp(min=0)
    told = F.one_hot(labels, head.num_classes + 1)[..., :-1].bool() & valid
    others = told.any(dim=2) & (logits.argmax(dim=2) != labels)
    return Counts(*(int(x.sum()) for x in (told, thought, told & thought, others)))


def disagreement(cfg: CfgNode, batches: int) -> Counts:
    """Over the first batches of training. The student is as initialised: what its anchors learn
    does not depend on its predictions.

    Raises:
        UserError: if the recipe is not of prediction mimicking.
    """
    model = build_model(cfg)
    if not isinstance(model, TeacherStudent) or "Mimicking" not in model.distillers:
        raise UserError(
            f"DISTILL.METHODS is {list(cfg.DISTILL.METHODS)}: give a recipe of Mimicking, which "
            "reads assignment and predictions"
        )
    found: List[Counts] = []
    model.distillers["Mimicking"].register_forward_hook(
        lambda method, views, _: found.append(count(*views[:2]))
    )
    loader = iter(DistillTrainer.build_train_loader(cfg))
    with EventStorage(cfg.SOLVER.MAX_ITER // 2), torch.no_grad():
        for _ in range(batches):
            model(next(loader))
    return Counts(*map(sum, zip(*found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a recipe of Mimicking")
    parser.add_argument("--batches", type=int, default=50, help="how many; default: 50")
    parser.add_argument("opts", nargs="*", help="KEY VALUE ...")
    args = parser.parse_intermixed_args()
    try:
        found = disagreement(read_config(args.config, args.opts), args.batches)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    print(
        f"{found.truth} anchors with an object: the teacher scores another class highest on "
        f"{found.share_of_other_classes:.0%}\n{found.truth + found.teacher - found.both} pairs of "
        f"anchor and class that either calls an object: one alone does on {found.share:.0%}"
    )


if __name__ == "__main__":
    main()
