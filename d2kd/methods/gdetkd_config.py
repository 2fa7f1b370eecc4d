"""G-DetKD's config: its keys, what they may be, and the parts that they describe."""

from typing import Dict, List, Sequence, Tuple, Union

from detectron2.config import CfgNode
from torch import nn

from d2kd.errors import UserError, nearest
from d2kd.methods.contrastive import RegionContrast
from d2kd.methods.dense_rois import DenseSampling
from d2kd.methods.regions import DenseRegions, TwoStageRegions
from d2kd.methods.schedule import term_config
from d2kd.methods.semantic_guided import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    MaskedImitation,
    SemanticGuidedImitation,
)
from d2kd.modeling.families import Family, Level, copy_weights, paired_levels

KEY = "DISTILL.GDETKD"
# Which student level a region's feature is taken from: a weighted sum of all, or the one that the
# region's size assigns it to; or no regions, but the levels inside of objects
MATCHES = ("soft", "assigned", "gt_mask")
# Whose levels a soft match weighs
AGGREGATES = ("student", "teacher")
# Whose sampled proposals are the regions of a two-stage student; or boxes around objects
SOURCES = ("student", "teacher", "gt_jitter")
# (lowest, highest) of numbers; None = no bound
RANGES = {
    "TAU_INIT": (MIN_TEMPERATURE, MAX_TEMPERATURE),
    "GAMMA": (1e-3, None),
    "KL_TEMPERATURE": (1e-3, None),
    "PROJ_DIM": (0, None),
    "QUEUE_SIZE": (0, None),
    "NEGATIVE_IOU": (0, 1),
    "DENSE.PRE_NMS_TOPK": (1, None),
    "DENSE.POST_NMS_TOPK": (1, None),
    "DENSE.ROIS_PER_IMAGE": (1, None),
    "DENSE.NMS_THRESH": (0, 1),
    "DENSE.POSITIVE_IOU": (0, 1),
    "DENSE.POSITIVE_FRACTION": (0, 1),
}


def gdetkd_config() -> CfgNode:
    """The node ``DISTILL.GDETKD``. Comments say where a default is from: a published reading note
    of the paper, a re-implementation that reproduces its gain, or our reading of both."""
    node = CfgNode()
    # Weights. Reading note: an unweighted sum; re-implementation: 1 and 0.5 for these two
    node.SGFI = term_config(weight=1.0)
    node.CKD = term_config(weight=0.5)
    # Reading note: 1 each. Two-stage students only
    node.CLS = term_config(weight=1.0)
    node.BBOX = term_config(weight=1.0)

    # The regions of a two-stage student: the student's sampled proposals (re-implementation), or
    # (our reading of what else there is) the teacher's, or gt_jitter,
    # ROI_HEADS.BATCH_SIZE_PER_IMAGE boxes around an image's objects. For those of others than
    # itself, the student's box head runs once more
    node.ROIS = "student"
    # Leave background regions out (reading note and re-implementation: keep all)
    node.FOREGROUND_ONLY = False

    # soft (reading note); assigned: the one level of the region's size (its "RoIFI"); gt_mask: no
    # regions, but the levels of equal stride inside of objects (our reading of its "GT mask")
    node.MATCH = "soft"
    # Whose levels a soft match weighs: the student's, towards the one region of the teacher
    # (reading note and re-implementation), or all of the teacher's, as the target of the student's
    # one region (our reading of the opposite, an ablation)
    node.AGGREGATE = "student"
    # Stop the gradient at the weights of levels (our reading: it goes through them). Nothing else
    # trains the keys' convolutions and the temperature, which then stay as they are initialised
    node.DETACH_ALPHA = False
    # Names of the student levels to match; empty = all (reading note)
    node.LEVELS = []
    # One 1x1 convolution for all levels (re-implementation), or one per level
    node.ADAPTER_PER_LEVEL = False
    # Widths of the 3x3 convolutions of stride 2 that make a key (reading note: two of them;
    # re-implementation: the widths, no padding), and whether the last has a ReLU (both)
    node.EMBED_DIMS = [128, 64]
    node.FINAL_RELU = True
    # What the learned temperature of the matching starts from (re-implementation). It is
    # learned as an exponent and kept within 0.01 ... 100 (our reading)
    node.TAU_INIT = 1.0
    # Mean over all elements (re-implementation), or over regions alone
    node.MEAN_REDUCTION = True

    # Contrast what the last shared layer gives before its ReLU (re-implementation), or after it, as
    # the predictor reads it (our reading). A dense student's is the last block of its class tower
    node.PRE_RELU = False
    # Width of the projection that student and teacher share (reading note: there is one; our
    # reading: its width); 0 = none, instead an adapter in any case (re-implementation)
    node.PROJ_DIM = 128
    # One adapter for every anchor of a location (re-implementation), or one for all
    node.PER_ANCHOR_ADAPTER = True
    # Temperature of the contrast (re-implementation)
    node.GAMMA = 0.07
    # Whether the positive pair counts in the denominator (our reading of the note's indices;
    # re-implementation: no)
    node.POSITIVE_IN_DENOMINATOR = True
    # Regions of an image that overlap more are no negatives (reading note: there is such a
    # threshold; re-implementation: its value); 1 = all are
    node.NEGATIVE_IOU = 0.5
    # Nor are regions of an image whose objects are of one class (our reading: they are)
    node.EXCLUDE_SAME_CLASS = False
    # Regions of past steps in the memory, over all GPUs (re-implementation: 10 steps of 8 GPUs
    # with 2 images; reading note: there is a memory over GPUs); 0 = none
    node.QUEUE_SIZE = 81920
    # Keep the teacher's vectors and project them anew in every step (our reading: keep them
    # projected, which takes less memory)
    node.QUEUE_RAW = False
    # The projection learns from the student's vectors alone (our reading: from both)
    node.STOP_GRAD_TEACHER_PROJ = False

    # Temperature of the class distributions in CLS, a KL divergence (our reading; cross entropy has
    # the same gradient)
    node.KL_TEMPERATURE = 1.0
    # BBOX sums over the four deltas, as Detectron2's own loss does (our reading), or takes their
    # mean
    node.MEAN_OVER_DELTAS = False

    # Start the student's box head, and its RPN head, as copies of the teacher's. The full
    # method copies the box head (reading note; our reading: not the RPN head). MODEL.WEIGHTS is
    # read afterwards: a file that has these heads overwrites the copies
    node.HEAD_TRANSFER = False
    node.HEAD_TRANSFER_RPN = False

    # Regions of a dense student: its best anchors per level and image, non-maximum suppression
    # within levels, its best boxes per image (re-implementation)
    node.DENSE = CfgNode()
    node.DENSE.PRE_NMS_TOPK = 2000
    node.DENSE.NMS_THRESH = 0.7
    node.DENSE.POST_NMS_TOPK = 1000
    # IoU with an object that makes a box positive, and the share of positives (reading note
    # and re-implementation), of so many regions per image (re-implementation)
    node.DENSE.POSITIVE_IOU = 0.5
    node.DENSE.POSITIVE_FRACTION = 0.25
    node.DENSE.ROIS_PER_IMAGE = 512
    # Whether the centerness counts in a box's score (re-implementation: no)
    node.DENSE.USE_CENTERNESS = False
    # Add the objects themselves to the regions of SGFI (re-implementation: no)
    node.DENSE.APPEND_GT_FOR_SGFI = False
    return node


def check_config(node: CfgNode) -> None:
    """
    Raises:
        UserError: if a value is unknown or out of its range.
    """
    for name, known in (("ROIS", SOURCES), ("MATCH", MATCHES), ("AGGREGATE", AGGREGATES)):
        if node[name] not in known:
            raise UserError(f"{KEY}.{name} is '{node[name]}': {nearest(node[name], known)}")
    for name, (lowest, highest) in RANGES.items():
        value = node.DENSE[name[6:]] if name.startswith("DENSE.") else node[name]
        if value < lowest or (highest is not None and value > highest):
            bounds = f"{lowest} or more" if highest is None else f"{lowest} ... {highest}"
            raise UserError(f"{KEY}.{name} is {value}: give {bounds}")


def check_pair(node: CfgNode, terms: Sequence[str], student: Family, teacher: Family) -> None:
    """
    Raises:
        UserError: if the two detectors do not fit each other.
    """
    if not student.offers & {"rois", "tower"}:
        raise UserError(
            f"DISTILL.METHODS names GDetKD, which compares regions of an FPN, but the student "
            f"{student.name} offers only {', '.join(sorted(student.offers))}: take another student"
        )
    for term in ("cls", "bbox"):
        if term in terms:
            key = f"{KEY}.{term.upper()}.WEIGHT"
            student.box_head.check_same_classes(teacher.box_head, 0, key)
    if "ckd" in terms and node.PRE_RELU:
        _check_last_fc(student, teacher)
    if "rois" not in student.offers:
        chosen = {
            "ROIS": node.ROIS != "student",
            "HEAD_TRANSFER": node.HEAD_TRANSFER,
            "HEAD_TRANSFER_RPN": node.HEAD_TRANSFER_RPN,
        }
        for name, wrong in chosen.items():
            if wrong:
                raise UserError(
                    f"{KEY}.{name} is {node[name]}, but the student {student.name} is not a "
                    "two-stage detector: leave it at its default"
                )


def transfer_heads(node: CfgNode, student: Family, teacher: Family) -> None:
    """Starts the student's heads as copies of the teacher's, as the config says.

    Raises:
        UserError: if a head has another shape.
    """
    if node.HEAD_TRANSFER:
        student.box_head.copy_from(teacher.box_head, f"{KEY}.HEAD_TRANSFER")
    if node.HEAD_TRANSFER_RPN:
        key = f"{KEY}.HEAD_TRANSFER_RPN"
        copy_weights(student.dense_head.module, teacher.dense_head.module, key)


def build_imitation(node: CfgNode, student: Family, teacher: Family) -> nn.Module:
    """The parts of the term "sgfi"."""
    if node.MATCH == "gt_mask":
        pairs = paired_levels(student, teacher, f"{KEY}.MATCH")
        return MaskedImitation([(student.levels[i], teacher.levels[j]) for i, j in pairs])
    pooler = teacher.box_head.module.box_pooler
    levels = _student_levels(node, student)
    soft = node.MATCH == "soft"
    if soft:
        _check_embedding(node.EMBED_DIMS, min(pooler.output_size))
    if not soft or node.AGGREGATE == "teacher":
        # One student level per region, no coarser than what the teacher pools from
        levels = [lv for lv in levels if lv.stride <= 2**pooler.max_level]
        _check_consecutive(levels, "AGGREGATE" if soft else "MATCH", node)
    return SemanticGuidedImitation(
        levels,
        teacher.levels[0].channels,
        pooler.output_size,
        soft=soft,
        teacher_levels=teacher.levels if soft and node.AGGREGATE == "teacher" else (),
        detach_weights=node.DETACH_ALPHA,
        embed_dims=node.EMBED_DIMS,
        final_relu=node.FINAL_RELU,
        adapter_per_level=node.ADAPTER_PER_LEVEL,
        initial_temperature=node.TAU_INIT,
        mean_reduction=node.MEAN_REDUCTION,
    )


def build_contrast(node: CfgNode, student: Family, teacher: Family) -> RegionContrast:
    """The parts of the term "ckd"."""
    if "rois" in student.offers:
        width, num_anchors = student.box_head.hidden_dim(0), 1
    else:
        head = student.dense_head
        width = head.channels("cls", head.num_blocks("cls"))
        num_anchors = head.num_anchors if node.PER_ANCHOR_ADAPTER else 1
    return RegionContrast(
        width,
        teacher.box_head.hidden_dim(0),
        proj_dim=node.PROJ_DIM,
        num_anchors=num_anchors,
        gamma=node.GAMMA,
        positive_in_denominator=node.POSITIVE_IN_DENOMINATOR,
        negative_iou=node.NEGATIVE_IOU,
        exclude_same_class=node.EXCLUDE_SAME_CLASS,
        queue_size=node.QUEUE_SIZE,
        queue_raw=node.QUEUE_RAW,
        stop_grad_teacher_proj=node.STOP_GRAD_TEACHER_PROJ,
    )


def build_regions(node: CfgNode, student: Family) -> Union[TwoStageRegions, DenseRegions]:
    """Where the regions come from."""
    if "rois" in student.offers:
        count = student.box_head.batch_size_per_image
        return TwoStageRegions(node.ROIS, count, pre_relu=node.PRE_RELU)
    options = {k.lower(): v for k, v in node.DENSE.items()}
    sampling = DenseSampling(**{k: options[k] for k in DenseSampling._fields})
    return DenseRegions(sampling, student.dense_head.num_blocks("cls"), pre_relu=node.PRE_RELU)


def delta_units(student: Family, teacher: Family) -> Dict[str, Tuple[float, ...]]:
    """The argument ``delta_scale``: ``BBOX_REG_WEIGHTS`` of the two may differ."""
    ours, theirs = (family.box_head.delta_weights(0) for family in (student, teacher))
    return {"delta_scale": tuple(w_s / w_t for w_s, w_t in zip(ours, theirs))}


def _student_levels(node: CfgNode, student: Family) -> List[Level]:
    known = {level.name: level for level in student.levels}
    for name in node.LEVELS:
        if name not in known:
            raise UserError(f"{KEY}.LEVELS names '{name}': {nearest(name, known)}")
    return [level for name, level in known.items() if name in (node.LEVELS or known)]


def _check_last_fc(student: Family, teacher: Family) -> None:
    for name, family in (("student", student), ("teacher", teacher)):
        if "rois" in family.offers and family.box_head.last_fc(0) is None:
            raise UserError(
                f"{KEY}.PRE_RELU is True, but the box head of the {name} has no fully connected "
                "layer: set it to False"
            )


def _check_consecutive(levels: Sequence[Level], name: str, node: CfgNode) -> None:
    strides = [level.stride for level in levels]
    if not strides or any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise UserError(
            f"{KEY}.{name} is '{node[name]}', but the student's levels up to the teacher's "
            f"coarsest have strides {strides}: give {KEY}.LEVELS of which each has twice the stride"
        )


def _check_embedding(widths: Sequence[int], resolution: int) -> None:
    size = resolution
    for _ in widths:
        size = (size - 3) // 2 + 1 if size >= 3 else 0
    if not widths or min(widths) < 1 or size < 1:
        raise UserError(
            f"{KEY}.EMBED_DIMS is {list(widths)}, but convolutions of stride 2 have to leave "
            f"something of the teacher's {resolution} x {resolution} regions: give one or more "
            "widths above 0, two for 7 x 7"
        )
