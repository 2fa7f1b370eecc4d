"""The config of HGD (our reading of the abstract): its keys, and what they may be."""

from typing import Sequence

from detectron2.config import CfgNode

from d2kd.errors import UserError, nearest
from d2kd.methods.distances import DISTANCES, NORMS
from d2kd.methods.schedule import term_config
from d2kd.modeling.families import Family, StagePair

KEY = "DISTILL.HGD"
# What the views call the maps
SOURCES = {"backbone": ("stages",), "neck": ("features",), "both": ("stages", "features")}
TAPS = ("post_relu", "pre_relu")
PAIRINGS = ("stride", "order", "learned")
UNPAIRED = ("drop", "average")
MACROS = ("gap", "per_image", "uncertainty")
RANGES = {
    "BETA_S": (0, 4),
    "BETA_C": (0, 4),
    "GAP_GAMMA": (0, 4),
    "FG_KAPPA": (0, 1000),
    "W_MAX": (1, 1000000),
    "ETA": (-2, 2),
}


def hgd_config() -> CfgNode:
    """The node ``DISTILL.HGD``. Every default is our reading of the abstract."""
    node = CfgNode()
    # λ (our reading). LEVEL_WEIGHTS: one factor per stage, the "manual" macro weights
    node.FEATURE = term_config(weight=1.0, warmup_iters=1000)
    # backbone (stages), neck (FPN levels) or both (our reading)
    node.SOURCE = "backbone"
    # The student's stages or levels, by name; empty = all that are trained (our reading)
    node.STAGES = []
    # Stages after the ReLU that ends them (post_relu), or before it (pre_relu; Detectron2's ResNets
    # alone). FPN levels have none (our reading)
    node.TAP = "post_relu"
    # stride; order (from the coarsest); learned: a mix of all teacher stages, which must
    # be of one width (our reading)
    node.PAIRING = "stride"
    # Teacher stages without a partner: drop; or average them, at the partner's size, into the pair
    # of nearest stride, all of one width (our reading)
    node.UNPAIRED = "drop"
    # Errors are divided by the running root mean square of the teacher's stage (energy), by
    # the standard deviation of each of its channels (channel_std), or not (our reading)
    node.NORM = "energy"
    # l2, l1, smooth_l1, cosine (of positions; NORM has no effect), or partial_l2: no error
    # where student <= teacher <= 0, for maps with negative values (our reading)
    node.DISTANCE = "l2"
    # Micro weights: powers of the teacher's activation per position and per channel, and of
    # the error per position; 0 = off (our reading)
    node.BETA_S = 1.0
    node.BETA_C = 1.0
    node.GAP_GAMMA = 0.0
    # Positions in ground-truth boxes weigh 1 + FG_KAPPA times as much (our reading)
    node.FG_KAPPA = 0.0
    # Highest product of the micro weights, before their mean becomes 1 (our reading)
    node.W_MAX = 10.0
    # Macro weights: gap (of stages, by their running loss), per_image (of images, by their
    # loss), or uncertainty (learned, of stages) (our reading)
    node.MACRO = "gap"
    # Power of the gap: 1 = more for those that lag, 0 = uniform, -1 = equal shares of the loss
    # (our reading)
    node.ETA = 1.0
    return node


def check_config(node: CfgNode) -> None:
    """
    Raises:
        UserError: if a value is unknown or out of its range.
    """
    choices = {
        "SOURCE": SOURCES,
        "TAP": TAPS,
        "PAIRING": PAIRINGS,
        "UNPAIRED": UNPAIRED,
        "NORM": NORMS,
        "DISTANCE": DISTANCES,
        "MACRO": MACROS,
    }
    for name, known in choices.items():
        if node[name] not in known:
            raise UserError(f"{KEY}.{name} is '{node[name]}': {nearest(node[name], known)}")
    wrong = [
        f"{KEY}.{name} is {node[name]}: give {low} to {high}"
        for name, (low, high) in RANGES.items()
        if not low <= node[name] <= high
    ]
    if wrong:
        raise UserError("; ".join(wrong))


def check_before_relu(pairs: Sequence[StagePair], student: Family, teacher: Family) -> None:
    """
    Raises:
        UserError: if a stage cannot be had before its last ReLU.
    """
    stages = [pair for pair in pairs if pair.part == "stages"]
    sides = {
        "student": (student, [pair.student for pair in stages]),
        "teacher": (teacher, [stage for pair in stages for stage in pair.teachers]),
    }
    for side, (family, levels) in sides.items():
        missing = [s.name for s in levels if s.name not in family.stages_before_relu]
        if missing:
            raise UserError(
                f"{KEY}.TAP is 'pre_relu', but {', '.join(missing)} of the {side} "
                f"({type(family.stage_module).__name__}) do not end in a residual block of "
                "Detectron2's ResNets: set it to 'post_relu'"
            )
