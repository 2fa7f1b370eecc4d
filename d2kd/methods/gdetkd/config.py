"""G-DetKD's config keys. The help of each says where its default comes from:

- note: a published reading note of the paper;
- [R]: a re-implementation, the G-DetKD baseline of HEAD (ECCV 2022, LutingWang/todd and
  LutingWang/HEAD on GitHub), which is said to reproduce the paper's gain;
- ours: published in no source that we found.

docs/methods/gdetkd.md has more on them."""

from d2kd.methods.core import term
from d2kd.schema import Key

# Which student level a region's feature is taken from: a weighted sum of all, or the one that the
# region's size assigns it to; or no regions, but the levels inside of objects
MATCHES = ("soft", "assigned", "gt_mask")
# Whose levels a soft match weighs
AGGREGATES = ("student", "teacher")

KEYS = {
    "SGFI": term(1.0, "Weight of the loss on features of regions. note: an unweighted sum; [R]: 1"),
    "CKD": term(0.5, "Weight of the contrast of regions. note: an unweighted sum; [R]: 0.5"),
    "CLS": term(1.0, "Weight of the loss on classes of regions, two-stage students only. note: 1"),
    "BBOX": term(1.0, "Weight of the loss on boxes of regions, two-stage students only. note: 1"),
    "PROPOSALS_FROM": Key(
        "student",
        "Whose sampled proposals are the regions of a two-stage student ([R]: the student's; ours: "
        "the teacher's, for which the student's box head runs once more)",
        choices=("student", "teacher"),
    ),
    "FOREGROUND_ONLY": Key(False, "Leave background regions out (note and [R]: keep all)"),
    "MATCH": Key(
        "soft",
        "Which student level a region's feature comes from: soft: a weighted sum of all (note); "
        'assigned: the one level of the region\'s size (its "RoIFI"); gt_mask: no regions, but the '
        'levels of equal stride inside of objects (ours, of its "GT mask")',
        choices=MATCHES,
    ),
    "AGGREGATE": Key(
        "student",
        "Whose levels a soft match weighs: the student's, towards the one region of the teacher "
        "(note and [R]), or the teacher's, as the target of the student's one region (ours, an "
        "ablation)",
        choices=AGGREGATES,
    ),
    "LEVELS": Key([], "Names of the student levels to match; empty = all (note)", item=str),
    "EMBED_DIMS": Key(
        [128, 64],
        "Widths of the 3x3 convolutions of stride 2, with ReLU, that make a key (note: two; [R]: "
        "the widths, no padding)",
        low=1,
        high=1024,
    ),
    "PRE_ACTIVATION": Key(
        False,
        "Contrast what the last shared layer gives before its ReLU (ours), or after it, as the "
        "predictor reads it ([R]). A dense student's is the last block of its class tower",
    ),
    "PROJ_DIM": Key(
        128,
        "Width of the projection that student and teacher share (note: there is one; ours: its "
        "width); 0 = none, instead an adapter in any case ([R])",
        low=0,
        high=4096,
    ),
    "GAMMA": Key(0.07, "Temperature of the contrast ([R])", low=1e-3),
    "POSITIVE_IN_DENOMINATOR": Key(
        True, "Whether the positive pair counts in the denominator (ours, of the note; [R]: no)"
    ),
    "NEGATIVE_IOU": Key(
        0.5,
        "Regions of an image that overlap more are no negatives (note: there is such a threshold; "
        "[R]: its value); 1 = all are",
        low=0,
        high=1,
    ),
    "QUEUE_SIZE": Key(
        81920,
        "Regions of past steps in the queue, over all GPUs ([R]: 10 steps of 8 GPUs with 2 "
        "images); 0 = none",
        low=0,
        high=10_000_000,
    ),
    "HEAD_TRANSFER": Key(
        False,
        "Start the student's box head as a copy of the teacher's (note, in the full method). "
        "MODEL.WEIGHTS is read afterwards: a file that has this head overwrites the copy",
    ),
    # The regions of a dense student
    "DENSE": {
        "PRE_NMS_TOPK": Key(
            2000, "Anchors of the student with the highest scores, per level and image ([R])", low=1
        ),
        "POST_NMS_TOPK": Key(
            1000,
            "Boxes with the highest scores that stay after suppression, per image ([R])",
            low=1,
        ),
        "ROIS_PER_IMAGE": Key(
            512, "Regions that are sampled of these boxes, per image ([R])", low=1
        ),
    },
}
