"""Small pairs for G-DetKD, and what its distiller is called with."""

import torch
from detectron2.structures import Boxes
from toys import distill_config, step

from d2kd.distillation import build_model
from d2kd.methods.gdetkd.contrast import RegionContrast
from d2kd.views import RegionSet

KEY = "DISTILL.GDETKD."
PREDICTIONS_OFF = [KEY + "CLS.WEIGHT", 0.0, KEY + "BBOX.WEIGHT", 0.0]
SGFI_OFF, CKD_OFF = [KEY + "SGFI.WEIGHT", 0.0], [KEY + "CKD.WEIGHT", 0.0]
SGFI_ALONE = [*CKD_OFF, *PREDICTIONS_OFF]
SMALL = [KEY + "QUEUE_SIZE", 300, KEY + "DENSE.ROIS_PER_IMAGE", 64]
DENSE = ("RetinaNet", "FCOS", "ATSS", "GFL")
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
CASCADE += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
BOXES = torch.tensor([[4.0, 6, 40, 50], [10, 2, 90, 60], [30, 30, 42, 44]])


def model_of(folder, name, opts=(), **teacher):
    """A student beside a Faster R-CNN; dense students learn features and contrast."""
    teacher.setdefault("teacher", "FasterRCNN")
    off = PREDICTIONS_OFF if name in DENSE else []
    opts = [*SMALL, *off, *opts]
    cfg = distill_config(folder, name, opts, methods=["GDetKD"], **teacher)
    torch.manual_seed(3)
    return build_model(cfg)


def distilled(losses):
    return {k[len("loss_gdetkd_") :]: v for k, v in losses.items() if k.startswith("loss_gdetkd_")}


def views_of(model, inputs):
    """The two views and the targets that the distiller was called with in one step."""
    kept = []
    handle = model.distillers["GDetKD"].register_forward_hook(lambda m, args, _: kept.append(args))
    step(model, inputs)
    handle.remove()
    return kept[0]


def regions_of(boxes, classes=None):
    """Regions of one image."""
    classes = torch.zeros(len(boxes), dtype=torch.long) if classes is None else classes
    return RegionSet([Boxes(boxes)], [classes])


def pooled_by_the_student(student, regions):
    """What the box pooler of a two-stage student makes of regions."""
    heads = student.family.detector.roi_heads
    return heads.box_pooler([student.features[x] for x in heads.box_in_features], regions.boxes)


def calls_of(modules):
    """A list that grows by a name whenever one of the modules, by name, runs."""
    calls = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def region_contrast(student_dim, teacher_dim, **changed):
    """A :class:`RegionContrast` with the defaults of the config, but for some."""
    options = {"proj_dim": 128, "num_anchors": 1, "gamma": 0.07, "positive_in_denominator": True}
    options.update(negative_iou=0.5, queue_size=81920)
    return RegionContrast(student_dim, teacher_dim, **{**options, **changed})
