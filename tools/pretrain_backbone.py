#!/usr/bin/env python
"""Trains the backbone of a config to name single drawn shapes.

    python tools/pretrain_backbone.py shapes/baselines/retinanet_R_18.yaml

What ImageNet is to the detectors of practice, this is to those of the drawn data sets: a start from
classification. The file is written where MODEL.WEIGHTS of the config looks for it, and holds the
backbone alone, by the names that it has in the detector.
"""

import argparse
import dataclasses
import os
from typing import Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from d2kd.config import read_config
from d2kd.data.shapes import SHAPES, draw_image
from d2kd.errors import UserError
from d2kd.writing import atomic_write

# One shape of the larger data set that fills its image, nothing before or behind it
SINGLE = dataclasses.replace(
    SHAPES, sizes=((48, 48),), radius=(12, 23), objects=(1, 1), clutter=(0, 0), occluders=(0, 0)
)
BATCH = 64
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.01
VALIDATION_IMAGES = 1000


class SingleShapes(Dataset):
    """Images of one shape each, drawn when they are asked for: (3, 48, 48) float32 as the detector
    reads them, and the index of the class."""

    def __init__(self, cfg: CfgNode, split: str, length: int):
        self._split, self._length = split, length
        self._rgb = cfg.INPUT.FORMAT == "RGB"
        self._mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)
        self._std = torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tuple[Tensor, int]:
        image, shapes = draw_image(SINGLE, 0, self._split, index)
        image = image[..., ::-1].copy() if self._rgb else image
        pixels = (torch.from_numpy(image).permute(2, 0, 1) - self._mean) / self._std
        return pixels, shapes[0].label


class Classifier(nn.Module):
    """A linear layer on the mean of a backbone's last stage."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.stage, shape = list(backbone.output_shape().items())[-1]
        self.linear = nn.Linear(shape.channels, len(SINGLE.classes))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> class scores (N, K)."""
        return self.linear(self.backbone(images)[self.stage].mean(dim=(2, 3)))


def pretrain(cfg: CfgNode, steps: int) -> Tuple[Backbone, float]:
    """
    Args:
        cfg: of a detector whose backbone is an FPN on another one, which is what is trained.
        steps: of 64 images, each seen once.

    Returns:
        the backbone below the FPN, and its accuracy on images that it did not see, in [0, 1].
    """
    torch.manual_seed(max(cfg.SEED, 0))
    model = Classifier(build_backbone(cfg).bottom_up).to(cfg.MODEL.DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    loader = DataLoader(SingleShapes(cfg, "train", BATCH * steps), BATCH)
    for images, labels in tqdm(loader, unit="step"):
        loss = F.cross_entropy(model(images.to(cfg.MODEL.DEVICE)), labels.to(cfg.MODEL.DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.backbone, accuracy(model.eval(), cfg)


@torch.no_grad()
def accuracy(model: Classifier, cfg: CfgNode) -> float:
    """Share of the validation images whose class scores highest."""
    loader = DataLoader(SingleShapes(cfg, "val", VALIDATION_IMAGES), BATCH)
    right = [model(x.to(cfg.MODEL.DEVICE)).argmax(dim=1).cpu() == labels for x, labels in loader]
    return torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="of the detector")
    parser.add_argument("--steps", type=int, default=500, help="of 64 images; default: 500")
    parser.add_argument("opts", nargs="*", help="KEY VALUE ...")
    args = parser.parse_intermixed_args()
    try:
        cfg = read_config(args.config, args.opts)
        file = cfg.MODEL.WEIGHTS
        if not file.endswith(".pth") or "://" in file:
            raise UserError(f"MODEL.WEIGHTS is '{file}': give the .pth file to write")
        if os.path.exists(file):
            raise UserError(f"MODEL.WEIGHTS is '{file}', which is there: delete it to train anew")
        backbone, share = pretrain(cfg, args.steps)
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        weights = {f"backbone.bottom_up.{k}": v for k, v in backbone.state_dict().items()}
        with atomic_write(file, "wb") as f:
            torch.save({"model": weights}, f)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{file}: names {share:.1%} of {VALIDATION_IMAGES} single shapes")


if __name__ == "__main__":
    main()
