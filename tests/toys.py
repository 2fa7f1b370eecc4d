"""Small detectors, batches and configs that many tests share."""

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2kd.config import read_config
from d2kd.distillation import build_detector

# One small student per family, as shipped for the embedded benchmark
STUDENTS = {
    "RetinaNet": "shapes/baselines/retinanet_tiny.yaml",
    "FCOS": "shapes/baselines/fcos_tiny.yaml",
    "ATSS": "shapes/baselines/atss_tiny.yaml",
    "GFL": "shapes/baselines/gfl_tiny.yaml",
    "FasterRCNN": "shapes/baselines/faster_rcnn_tiny.yaml",
}
# A teacher with the modules and weights of its file
AS_LOADED = ["DISTILL.TEACHER.FOLD_NORMS", False, "DISTILL.TEACHER.CHANNELS_LAST", False]
SMALLER = ["MODEL.ROI_BOX_HEAD.FC_DIM", 16]


def config(name, opts=()):
    """The config of a shipped YAML with overrides."""
    return read_config(name, [*SMALLER, "MODEL.DEVICE", "cpu", *opts])


def detector(name, opts=(), seed=0):
    """An untrained detector of a shipped YAML."""
    torch.manual_seed(seed)
    return build_detector(config(name, opts))


def distill_config(folder, student, opts=(), teacher=None, teacher_opts=(), methods=("FRS",)):
    """The config of a student with a teacher of random weights, saved in a folder.

    Args:
        folder: where the teacher's file is written.
        student, teacher: names in STUDENTS; the same by default.
    """
    teacher = STUDENTS[teacher or student]
    teacher_opts = [*SMALLER, "MODEL.BASIC_RESNET.WIDTH", 16, *teacher_opts]
    weights = str(folder / "teacher.pth")
    torch.save({"model": detector(teacher, teacher_opts, seed=7).state_dict()}, weights)
    distill = ["DISTILL.METHODS", list(methods), "DISTILL.TEACHER.CONFIG", teacher]
    distill += ["DISTILL.TEACHER.WEIGHTS", weights, "DISTILL.TEACHER.OPTS", list(teacher_opts)]
    return config(STUDENTS[student], [*distill, "OUTPUT_DIR", str(folder / "run"), *opts])


def batch(sizes=((96, 128), (80, 100)), boxes=None, seed=0):
    """A batch as Detectron2's mapper makes it.

    Args:
        sizes: (height, width) per image.
        boxes: per image a list of xyxy; three random boxes each by default.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for i, (height, width) in enumerate(sizes):
        if boxes is None:
            corner = torch.rand(3, 2, generator=generator) * torch.tensor([width / 2, height / 2])
            size = 8 + torch.rand(3, 2, generator=generator) * 36
            gt_boxes = torch.cat([corner, corner + size], dim=1)
        else:
            gt_boxes = torch.tensor(boxes[i], dtype=torch.float32).reshape(-1, 4)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(gt_boxes)
        instances.gt_classes = torch.randint(0, 6, (len(gt_boxes),), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def step(model, inputs, iteration=1000, seed=0):
    """One training forward, with the random numbers and the iteration given."""
    torch.manual_seed(seed)
    model.train()
    with EventStorage(iteration):
        return model(inputs)


def gradients(model):
    """Copies of all gradients by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
