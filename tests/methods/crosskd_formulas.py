"""CrossKD's losses written out again for the tests, level by level, after the description of the
original code. Slow and simple on purpose; shares nothing with the package but the heads."""

import math

import torch
from crosskd_cases import LEVELS, STRIDES
from detectron2.structures import Boxes
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss

# Detectron2 clamps the logarithm of a size at this; the original from below as well
LARGEST = math.log(1000 / 16)
SUBNETS = {"cls": "cls_subnet", "bbox": "bbox_subnet"}
# The tower that the centerness stands on
CENTERNESS = {"atss": "bbox", "fcos": "cls"}


def align(student, teacher):
    """Mean and standard deviation per channel by torch's own functions."""

    def moments(x):
        flat = x.transpose(0, 1).flatten(1)
        return [m[None, :, None, None] for m in (flat.mean(dim=1), flat.std(dim=1))]

    (mean_s, std_s), (mean_t, std_t) = moments(student), moments(teacher)
    return (student - mean_s) / (std_s + 1e-6) * std_t + mean_t


def _blocks(head, branch, x, start, stop):
    size = 3 if hasattr(head, "scales") else 2  # conv, (norm), ReLU
    for module in list(getattr(head, SUBNETS[branch]))[start * size : stop * size]:
        x = module(x)
    return x


def _predict(name, head, towers, level):
    """Class, box and centerness maps of one level from the last features of both towers."""
    boxes = head.bbox_pred(towers["bbox"])
    if name != "retinanet":
        boxes = head.scales[level] * boxes
    if name == "fcos":
        boxes = boxes.exp()
    centerness = head.ctrness(towers[CENTERNESS[name]]) if name in CENTERNESS else None
    return head.cls_score(towers["cls"]), boxes, centerness


def _rows(x, width):
    """(N, A·width, h, w) -> (N·h·w·A, width)."""
    n, _, h, w = x.shape
    return x.reshape(n, -1, width, h, w).permute(0, 3, 4, 1, 2).reshape(-1, width)


def _decode(name, deltas, anchors):
    x1, y1, x2, y2 = anchors.unbind(1)
    width, height, cx, cy = x2 - x1, y2 - y1, (x1 + x2) / 2, (y1 + y2) / 2
    a, b, c, d = deltas.unbind(1)
    if name == "fcos":
        return torch.stack([cx - a, cy - b, cx + c, cy + d], dim=1)
    if name == "atss":
        a, b, c, d = 0.1 * a, 0.1 * b, 0.2 * c, 0.2 * d
    cx, cy = cx + a * width, cy + b * height
    width, height = (side * y.clamp(max=LARGEST).exp() for side, y in ((width, c), (height, d)))
    corners = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
    return torch.stack(corners, dim=1)


def _valid(level, shape, image_sizes):
    """(N, h, w): cells that begin within the image, whose sides are rounded up to 32 pixels."""
    valid = torch.zeros(len(image_sizes), *shape)
    for image, size in enumerate(image_sizes):
        rows, columns = (-(-(-(-side // 32) * 32) // STRIDES[level]) for side in size)
        valid[image, :rows, :columns] = 1
    return valid


def cross_losses(name, student, teacher, batch, depth, cross=True):
    """Unweighted terms, summed over levels.

    Args:
        name: "gfl", "retinanet", "atss" or "fcos".
        student, teacher: detectors on fixed levels.
        batch: the inputs.
        depth: blocks of the student's towers before the hand-over.
        cross: False compares the student's own predictions: prediction mimicking.
    """
    gt = [x["instances"] for x in batch]
    head_s, head_t, classes = student.head, teacher.head, student.num_classes
    levels_s, levels_t = student.backbone.levels, teacher.backbone.levels
    anchors = student.anchor_generator(list(levels_s))
    labels, gt_boxes = student.label_anchors(anchors, gt)
    sizes = [len(a) for a in anchors]
    labels = torch.stack(labels).split(sizes, dim=1)
    cls = bbox = centerness = positives = confidences = 0.0
    for level in LEVELS:
        own, crossed, plain = {}, {}, {}
        blocks = sum(isinstance(m, torch.nn.Conv2d) for m in head_s.cls_subnet)
        for branch in SUBNETS:
            own[branch] = _blocks(head_s, branch, levels_s[level], 0, blocks)
            plain[branch] = _blocks(head_t, branch, levels_t[level], 0, blocks)
            ours = _blocks(head_s, branch, levels_s[level], 0, depth)
            theirs = _blocks(head_t, branch, levels_t[level], 0, depth)
            crossed[branch] = _blocks(head_t, branch, align(ours, theirs).relu(), depth, blocks)
        x, boxes_x, ctr_x = (
            _predict(name, head_t, crossed, level) if cross else _predict(name, head_s, own, level)
        )
        z, boxes_z, ctr_z = (
            y if y is None else y.detach() for y in _predict(name, head_t, plain, level)
        )
        per_cell = sizes[level] // z[0, 0].numel()
        valid = _valid(level, z.shape[2:], [g.image_size for g in gt])
        valid = valid.flatten().repeat_interleave(per_cell)
        label = labels[level].flatten()
        counted = torch.ones_like(valid) if name == "fcos" else valid * (label != -1)
        positive = valid * ((label >= 0) & (label < classes))

        logits, q = _rows(x, classes), _rows(z, classes).sigmoid()
        p = logits.sigmoid()
        bce = -(q * p.log() + (1 - q) * (1 - p).log())
        cls = cls + (((p - q).abs() * bce).sum(1) * counted).sum()

        confidence = q.max(dim=1).values * counted
        if name == "gfl":
            sides_x, sides_z = (_rows(y, 17).log_softmax(1) for y in (boxes_x, boxes_z))
            loss = (sides_z.exp() * (sides_z - sides_x)).sum(1).reshape(-1, 4).mean(1)
        else:
            cells = anchors[level].tensor.repeat(len(gt), 1)
            decoded = [_decode(name, _rows(y, 4), cells) for y in (boxes_x, boxes_z)]
            loss = generalized_box_iou_loss(*decoded)
            if name == "fcos":
                loss = -box_iou(*decoded).diagonal().clamp(min=1e-6).log()
        bbox = bbox + (loss * confidence).sum()
        confidences = confidences + confidence.sum()
        if name in CENTERNESS:
            target = _rows(ctr_z, 1).sigmoid()[:, 0]
            loss = F.binary_cross_entropy_with_logits(
                _rows(ctr_x, 1)[:, 0], target, reduction="none"
            )
            centerness = centerness + (loss * positive).sum()
        positives = positives + positive.reshape(len(gt), -1).sum(1)

    divisor = positives.clamp(min=1).sum()
    if name == "fcos":
        divisor = _centerness_sum(Boxes.cat(anchors), torch.cat(labels, 1), gt_boxes, classes)
    terms = {"cls": cls / divisor, "bbox": bbox / (confidences if name == "gfl" else divisor)}
    return {**terms, "centerness": centerness / divisor} if name in CENTERNESS else terms


def _centerness_sum(points, labels, gt_boxes, classes):
    total = 0.0
    for label, boxes in zip(labels, gt_boxes):
        on_object = label < classes
        (x, y), (x1, y1, x2, y2) = points.get_centers()[on_object].t(), boxes[on_object].t()
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        horizontal = torch.minimum(left, right) / torch.maximum(left, right)
        total += (horizontal * torch.minimum(top, bottom) / torch.maximum(top, bottom)).sqrt().sum()
    return max(float(total), 1.0)
