"""G-DetKD's config: what is refused, and where numbers arrive."""

import pytest
from gdetkd_cases import CASCADE, CKD_OFF, KEY, PREDICTIONS_OFF, SGFI_ALONE, SGFI_OFF, model_of

from d2kd.errors import UserError

TRANSFER = [KEY + "HEAD_TRANSFER", True]
MASKED = [KEY + "MATCH", "gt_mask"]
C4 = ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p4"]]
C4 += ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"]
C4 += PREDICTIONS_OFF
CONV_HEAD = ["MODEL.ROI_BOX_HEAD.NUM_FC", 0, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]
CONV_HEAD += ["MODEL.ROI_BOX_HEAD.CONV_DIM", 8]


def refused(folder, name, opts, message, **teacher):
    with pytest.raises(UserError, match=message) as error:
        model_of(folder, name, opts, **teacher)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, opts, teacher, message",
    [
        (
            "RetinaNet",
            [],
            "FCOS",
            r"GDETKD.SGFI.WEIGHT .* RoI features of the teacher: FCOS is not a two-stage",
        ),
        (
            "RetinaNet",
            SGFI_OFF,
            "FCOS",
            r"GDETKD.CKD.WEIGHT .* hidden vectors of the teacher: FCOS is not a two-stage",
        ),
        (
            "RetinaNet",
            [KEY + "CLS.WEIGHT", 1.0],
            "FasterRCNN",
            r"GDETKD.CLS.WEIGHT .* box predictions of the student: RetinaNet is not",
        ),
        (
            "FasterRCNN",
            ["MODEL.ROI_HEADS.NUM_CLASSES", 5],
            "FasterRCNN",
            r"GDETKD.CLS.WEIGHT .* 5 classes, the teacher's 6",
        ),
        (
            "FasterRCNN",
            ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, *TRANSFER],
            "FasterRCNN",
            r"HEAD_TRANSFER .* 'fc1.weight' has shape \(32, 3136\) .* \(16, 3136\)",
        ),
        ("RetinaNet", TRANSFER, "FasterRCNN", r"HEAD_TRANSFER is True.*Retina"),
        (
            "FasterRCNN",
            [*SGFI_OFF, *CKD_OFF, *PREDICTIONS_OFF, *TRANSFER],
            "FasterRCNN",
            r"HEAD_TRANSFER is True, but all weights .* are 0.* CLS.STOP_ITER 1",
        ),
        (
            "FasterRCNN",
            [*SGFI_ALONE, *MASKED, *TRANSFER],
            "RetinaNet",
            r"HEAD_TRANSFER is True, but the teacher RetinaNet has no box head",
        ),
        ("FasterRCNN", [*CASCADE, *TRANSFER], "FasterRCNN", r"HEAD_TRANSFER .* has 1, .* has 3:"),
        ("FasterRCNN", C4, "FasterRCNN", r"names GDetKD, .* GeneralizedRCNN has neither"),
        (
            "RetinaNet",
            [KEY + "PROPOSALS_FROM", "teacher"],
            "FasterRCNN",
            r"PROPOSALS_FROM is teacher.*RetinaNet",
        ),
        (
            "FasterRCNN",
            [*CONV_HEAD, KEY + "PRE_ACTIVATION", True],
            "FasterRCNN",
            r"hidden vectors before their activation of the student: the box head of General.* no "
            r"fully connected",
        ),
        ("FasterRCNN", [KEY + "LEVELS", ["p7"]], "FasterRCNN", r"LEVELS names 'p7'"),
        ("FasterRCNN", [KEY + "EMBED_DIMS", [8, 8, 8]], "FasterRCNN", r"EMBED_DIMS is \[8, 8, 8\]"),
        (
            "FasterRCNN",
            [KEY + "MATCH", "assigned", KEY + "LEVELS", ["p2", "p4"]],
            "FasterRCNN",
            r"MATCH is 'assigned'.*LEVELS of which each has twice the stride",
        ),
        (
            "FasterRCNN",
            [KEY + "AGGREGATE", "teacher", KEY + "LEVELS", ["p6"]],
            "FasterRCNN",
            r"AGGREGATE is 'teacher'.* have strides \[\]: give",
        ),
        (
            "RetinaNet",
            [*CKD_OFF, KEY + "AGGREGATE", "teacher"],
            "FCOS",
            r"^DISTILL.GDETKD.*FCOS",
        ),
        (
            "RetinaNet",
            [KEY + "SGFI.LEVEL_WEIGHTS", [1.0] * 5],
            "FasterRCNN",
            r"SGFI.LEVEL_WEIGHTS has 5 numbers: this term has no levels",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_named_in_one_line(tmp_path, name, opts, teacher, message):
    refused(tmp_path, name, opts, message, teacher=teacher)


def test_a_teacher_with_other_classes_does_not_say_what_is_foreground(tmp_path):
    """Its label for background is a class of the student."""
    opts = [*PREDICTIONS_OFF, KEY + "PROPOSALS_FROM", "teacher", KEY + "FOREGROUND_ONLY", True]
    message = r"^DISTILL.GDETKD.*classes"
    refused(tmp_path, "FasterRCNN", opts, message, teacher_opts=["MODEL.ROI_HEADS.NUM_CLASSES", 5])


def test_a_box_head_of_other_shape_is_not_copied(tmp_path):
    agnostic = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
    message = r"HEAD_TRANSFER .* 'bbox_pred.weight' has shape \(24, 16\) .* \(4, 16\)"
    refused(tmp_path, "FasterRCNN", TRANSFER, message, teacher_opts=agnostic)


@pytest.mark.parametrize(
    "opts, message",
    [
        ([KEY + "PROPOSALS_FROM", "jitter"], r"PROPOSALS_FROM is 'jitter': known: student, teach"),
        ([KEY + "AGGREGATE", "both"], r"AGGREGATE is 'both': known: student, teacher"),
        ([KEY + "MATCH", "sof"], r"MATCH is 'sof': did you mean 'soft'"),
        ([KEY + "PROJ_DIM", -1], r"PROJ_DIM is -1: give 0 \.\.\. 4096"),
        ([KEY + "QUEUE_SIZE", -1], r"QUEUE_SIZE is -1: give 0 \.\.\. 1e\+07"),
        ([KEY + "GAMMA", 0.0], r"GAMMA is 0.0: give 0.001 or more"),
        ([KEY + "NEGATIVE_IOU", 1.5], r"NEGATIVE_IOU is 1.5: give 0 \.\.\. 1"),
        ([KEY + "EMBED_DIMS", [8, 0]], r"EMBED_DIMS is \[8, 0\]: give 1 \.\.\. 1024, each"),
        ([KEY + "LEVELS", [3]], r"LEVELS is \[3\]: give a name, each"),
        ([KEY + "DENSE.ROIS_PER_IMAGE", 0], r"DENSE.ROIS_PER_IMAGE is 0: give 1 or more"),
        ([KEY + "DENSE.PRE_NMS_TOPK", 0], r"DENSE.PRE_NMS_TOPK is 0: give 1 or more"),
        (
            [KEY + "GAMMA", -1.0, KEY + "CKD.WEIGHT", -1.0],
            r"CKD.WEIGHT is -1.0: give 0 or more; DISTILL.GDETKD.GAMMA is -1.0",
        ),
    ],
)
def test_values_that_a_key_may_not_have_are_named_in_one_line(tmp_path, opts, message):
    refused(tmp_path, "FasterRCNN", opts, f"^DISTILL.GDETKD.{message}")


@pytest.mark.parametrize(
    "old, value, new", [("ROIS", "teacher", "PROPOSALS_FROM"), ("PRE_RELU", True, "PRE_ACTIVATION")]
)
def test_renamed_keys_are_refused_with_their_new_name(tmp_path, old, value, new):
    message = f"DISTILL.GDETKD.{old} is now called DISTILL.GDETKD.{new}"
    refused(tmp_path, "FasterRCNN", [KEY + old, value], message)


def test_numbers_reach_what_they_are_for(tmp_path):
    contrast = {"GAMMA": 0.2, "POSITIVE_IN_DENOMINATOR": False, "NEGATIVE_IOU": 0.3}
    sampling = {"PRE_NMS_TOPK": 70, "POST_NMS_TOPK": 40, "ROIS_PER_IMAGE": 30}
    values = {**contrast, **{f"DENSE.{name}": value for name, value in sampling.items()}}
    opts = [x for name, value in values.items() for x in (KEY + name, value)]
    distiller = model_of(tmp_path, "RetinaNet", opts).distillers["GDetKD"]
    for part, given in ((distiller.contrast, contrast), (distiller.source.sampling, sampling)):
        assert {name: getattr(part, name.lower()) for name in given} == given
