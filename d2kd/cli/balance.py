"""Proposes weights of the distillation terms, from the gradients of a short run.

Each term's gradient at the FPN is compared with that of the detection losses, over the second half
of the steps. The proposed weights give all terms of the recipe together the share that is asked
for: where to begin a search on your own validation set. docs/choosing.md has what they gained
beside the weights that the methods' authors published. With few steps the proposals are too large,
because the gradient of the detection losses is large at the beginning of training. Terms on
backbone stages alone, as HGD's by default, have no gradient at the FPN and get no proposal.

examples:
  d2kd balance shapes/frs/fcos_tiny.yaml MODEL.DEVICE cpu
"""

import argparse

from d2kd.check.balance import proposals_text, propose_weights
from d2kd.config import read_config
from d2kd.engine.preflight import refuse_unusable
from d2kd.errors import UserError

from .arguments import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a recipe, or a file")
    parser.add_argument(
        "--share",
        type=float,
        default=8.0,
        metavar="S",
        help="of all terms together, as a multiple of the detection losses' gradient; default: 8",
    )
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="of the short run; default: 100"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    if not 0 < args.share < 1000 or args.steps < 2:
        raise UserError(f"--share is {args.share}, --steps {args.steps}: give S > 0 and N > 1")
    cfg = read_config(args.config, args.opts)
    refuse_unusable(cfg)
    print(proposals_text(propose_weights(cfg, args.share, args.steps), args.config))
