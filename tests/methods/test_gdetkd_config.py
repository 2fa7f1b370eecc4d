"""G-DetKD's config: what is refused."""

import pytest
from test_gdetkd_distiller import CASCADE, KEY, model_of

from d2kd.errors import UserError

TRANSFER = [KEY + "HEAD_TRANSFER", True]
C4 = ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p4"]]
C4 += ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"]
C4 += [KEY + "CLS.WEIGHT", 0.0, KEY + "BBOX.WEIGHT", 0.0]
CONV_HEAD = ["MODEL.ROI_BOX_HEAD.NUM_FC", 0, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]
CONV_HEAD += ["MODEL.ROI_BOX_HEAD.CONV_DIM", 8]


@pytest.mark.parametrize(
    "name, opts, teacher, message",
    [
        ("RetinaNet", [], "FCOS", r"GDETKD.SGFI.WEIGHT .* rois of the teacher.* FCOS offers"),
        ("RetinaNet", [KEY + "CLS.WEIGHT", 1.0], "FasterRCNN", r"GDETKD.CLS.WEIGHT .* proposals"),
        (
            "FasterRCNN",
            ["MODEL.ROI_HEADS.NUM_CLASSES", 5],
            "FasterRCNN",
            r"GDETKD.CLS.WEIGHT .* 5 classes .* 6 classes",
        ),
        (
            "FasterRCNN",
            ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, KEY + "HEAD_TRANSFER", True],
            "FasterRCNN",
            r"HEAD_TRANSFER .* 'fc1.weight' has shape \(32, 3136\) .* \(16, 3136\)",
        ),
        (
            "RetinaNet",
            TRANSFER,
            "FasterRCNN",
            r"HEAD_TRANSFER is True.*Retina",
        ),
        ("FasterRCNN", [*CASCADE, *TRANSFER], "FasterRCNN", r"HEAD_TRANSFER .* has 1, .* has 3:"),
        ("FasterRCNN", C4, "FasterRCNN", r"names GDetKD, .* GeneralizedRCNN offers only dense"),
        ("RetinaNet", [KEY + "ROIS", "teacher"], "FasterRCNN", r"ROIS is teacher.*RetinaNet"),
        ("RetinaNet", [KEY + "ROIS", "gt_jitter"], "FasterRCNN", r"ROIS is gt_jitter.*RetinaNet"),
        ("FasterRCNN", [KEY + "ROIS", "jitter"], "FasterRCNN", r"ROIS is 'jitter': .*gt_jitter"),
        ("FasterRCNN", [KEY + "AGGREGATE", "both"], "FasterRCNN", r"AGGREGATE is 'both'"),
        (
            "FasterRCNN",
            [*CONV_HEAD, KEY + "PRE_RELU", True],
            "FasterRCNN",
            r"PRE_RELU is True.* student has no fully connected",
        ),
        ("FasterRCNN", [KEY + "PROJ_DIM", -1], "FasterRCNN", r"PROJ_DIM is -1: give 0 or more"),
        ("FasterRCNN", [KEY + "QUEUE_SIZE", -1], "FasterRCNN", r"QUEUE_SIZE is -1: give 0 or more"),
        ("FasterRCNN", [KEY + "GAMMA", 0.0], "FasterRCNN", r"GAMMA is 0.0: give 0.001 or more"),
        ("FasterRCNN", [KEY + "TAU_INIT", 0.0], "FasterRCNN", r"TAU_INIT is 0.0: give 0.01"),
        ("FasterRCNN", [KEY + "KL_TEMPERATURE", -1.0], "FasterRCNN", r"KL_TEMPERATURE is -1.0"),
        ("FasterRCNN", [KEY + "NEGATIVE_IOU", 1.5], "FasterRCNN", r"NEGATIVE_IOU is 1.5: .* 1"),
        (
            "RetinaNet",
            [KEY + "DENSE.ROIS_PER_IMAGE", 0],
            "FasterRCNN",
            r"DENSE.ROIS_PER_IMAGE is 0",
        ),
        ("FasterRCNN", [KEY + "MATCH", "sof"], "FasterRCNN", r"MATCH is 'sof': .*'soft'"),
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
    ],
)
def test_bad_input_is_one_line_when_the_model_is_built(tmp_path, name, opts, teacher, message):
    with pytest.raises(UserError, match=message) as error:
        model_of(tmp_path, name, opts, teacher=teacher)
    assert "\n" not in str(error.value)
