"""Config keys of the dense detectors and of the small backbones."""

from detectron2.config import CfgNode


def add_dense_detector_config(cfg: CfgNode) -> None:
    """Adds ``MODEL.FCOS``, ``.ATSS``, ``.GFL``, ``.TIMM`` and ``.BASIC_RESNET``."""
    cfg.MODEL.FCOS = _head_config(score_thresh=0.2)
    # Radius, in strides, of the central region of a box where locations are positive
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    _add_focal_loss(cfg.MODEL.FCOS)

    cfg.MODEL.ATSS = _head_config(score_thresh=0.05)
    # Weights of (dx, dy, dw, dh) in Box2BoxTransform
    cfg.MODEL.ATSS.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # Weight of the GIoU loss
    cfg.MODEL.ATSS.BBOX_LOSS_WEIGHT = 2.0
    _add_focal_loss(cfg.MODEL.ATSS)

    cfg.MODEL.GFL = _head_config(score_thresh=0.05)
    # Largest distance from a location to a side of its box, in strides; one bin per stride
    cfg.MODEL.GFL.REG_MAX = 16
    # Weight of the GIoU loss
    cfg.MODEL.GFL.BBOX_LOSS_WEIGHT = 2.0
    # Weight of the distribution focal loss
    cfg.MODEL.GFL.DFL_LOSS_WEIGHT = 0.25

    cfg.MODEL.TIMM = CfgNode()
    # Name of a timm model, for the backbones build_timm_...; PIXEL_MEAN, PIXEL_STD and
    # INPUT.FORMAT follow its metadata unless PIXEL_STD is set
    cfg.MODEL.TIMM.NAME = ""
    # Download timm's weights for it
    cfg.MODEL.TIMM.PRETRAINED = False

    cfg.MODEL.BASIC_RESNET = CfgNode()
    # Basic residual blocks in res2, res3, res4, res5
    cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE = [1, 1, 1, 1]
    # Channels of the stem and of res2; they double from stage to stage
    cfg.MODEL.BASIC_RESNET.WIDTH = 32


def _head_config(score_thresh: float) -> CfgNode:
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
    # Lowest score of a detection
    node.SCORE_THRESH_TEST = score_thresh
    # Predictions of one level that go into NMS, at most
    node.TOPK_CANDIDATES_TEST = 1000
    # IoU above which NMS removes the lower-scoring box of a class
    node.NMS_THRESH_TEST = 0.6
    return node


def _add_focal_loss(node: CfgNode) -> None:
    # Weight of positives
    node.FOCAL_LOSS_ALPHA = 0.25
    # How fast easy examples lose weight
    node.FOCAL_LOSS_GAMMA = 2.0
