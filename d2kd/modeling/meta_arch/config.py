"""Config keys of the dense detectors and of the small backbones."""

from detectron2.config import CfgNode


def add_dense_detector_config(cfg: CfgNode) -> None:
    """Adds ``MODEL.FCOS`` and ``MODEL.BASIC_RESNET``."""
    cfg.MODEL.FCOS = _head_config()
    # Radius of the region of positive locations around a box centre, in strides
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Lowest score, sqrt(class x centerness), of a detection
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2

    cfg.MODEL.BASIC_RESNET = CfgNode()
    # Basic residual blocks in res2, res3, res4, res5
    cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE = [1, 1, 1, 1]
    # Channels of the stem and of res2; they double from stage to stage
    cfg.MODEL.BASIC_RESNET.WIDTH = 32


def _head_config() -> CfgNode:
    """The keys that FCOS, ATSS and GFL have in common, named as in ``MODEL.RETINANET``."""
    node = CfgNode()
    # Number of classes, background excluded
    node.NUM_CLASSES = 80
    # FPN levels that the head reads, finest first
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Blocks (conv, norm, ReLU) in each of the two towers
    node.NUM_CONVS = 4
    # Norm of the towers: "", "GN", "BN", ...; GN makes 32 groups
    node.NORM = "GN"
    # Class probability that an untrained head predicts everywhere
    node.PRIOR_PROB = 0.01
    # Predictions of one level that go into NMS, at most
    node.TOPK_CANDIDATES_TEST = 1000
    # IoU above which NMS removes the lower-scoring box of a class
    node.NMS_THRESH_TEST = 0.6
    # Focal loss: weight of the positive class
    node.FOCAL_LOSS_ALPHA = 0.25
    # Focal loss: how fast easy examples lose weight
    node.FOCAL_LOSS_GAMMA = 2.0
    return node
