"""Trying a config without data: building what it describes, and steps on images of noise."""

from typing import List

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from d2kd.distillation import TeacherStudent, build_model
from d2kd.engine import DistillTrainer
from d2kd.engine.preflight import refuse_settings
from d2kd.errors import UserError


class LossNotFinite(UserError):
    """A loss is NaN or infinite, although images, boxes and weights are harmless."""


def build_for_training(cfg: CfgNode) -> nn.Module:
    """The model of a run, in training mode. No data are read.

    Raises:
        UserError: for settings with which no training can work.
    """
    refuse_settings(cfg)
    return build_model(cfg).train()


def try_on_noise(cfg: CfgNode, model: nn.Module) -> None:
    """Two steps on images of noise, with a learning rate of 0: there is nothing to be learned.

    Args:
        cfg: of a run.
        model: from :func:`build_for_training`; changed.

    Raises:
        LossNotFinite: for a loss that is not.
        UserError: if there can be no optimizer or schedule.
    """
    optimizer = DistillTrainer.build_optimizer(cfg, model)
    DistillTrainer.build_lr_scheduler(cfg, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    detector = model.student if isinstance(model, TeacherStudent) else model
    channels = len(getattr(detector, "pixel_mean", cfg.MODEL.PIXEL_MEAN))
    with EventStorage(1):
        for _ in range(2):
            inputs = noise(cfg, channels)
            losses = model(inputs)
            for name, loss in losses.items():
                if not torch.isfinite(loss):
                    raise LossNotFinite(f"{name} is {loss.item()} on images of noise")
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()


def noise(cfg: CfgNode, channels: int) -> List[dict]:
    """A batch of two small images of noise with an object each, as Detectron2's mapper makes it."""
    inputs = []
    for size in ((64, 96), (80, 64)):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 48.0]]))
        instances.gt_classes = torch.tensor([0])
        instances.gt_masks = PolygonMasks([[[8.0, 8.0, 40.0, 8.0, 40.0, 48.0]]])
        if cfg.MODEL.KEYPOINT_ON:
            points = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            instances.gt_keypoints = Keypoints(torch.full((1, points, 3), 20.0))
        image = torch.randint(256, (channels, *size), dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs
