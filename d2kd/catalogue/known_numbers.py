"""Numbers that stand in data files: what papers report of recipes, and what steps cost here."""

import functools
import os
from typing import Any, Dict, List, Optional

import yaml

from d2kd.benchmark.costs import Costs, read_costs

_D2KD = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Inside the package when installed, beside it in a checkout
_FOLDERS = (os.path.join(_D2KD, "docs"), os.path.join(os.path.dirname(_D2KD), "docs"))


def published(config: str) -> Optional[float]:
    """Published AP of a detector, AP50 on VOC; that of MMDetection's files is that of the same
    settings.

    Args:
        config: such as ``baselines/gfl_R_50_FPN_1x.yaml``.
    """
    return _data("recipes.yaml")["published"].get(config.replace("mmdet/", "baselines/"))


def metric_of(config: str) -> str:
    """What published numbers of a config or recipe are: AP on COCO, AP50 on VOC."""
    return "AP50" if "voc" in os.path.basename(config) else "AP"


def row(name: str) -> Dict[str, Any]:
    """What ``docs/recipes.yaml`` says of a recipe; a teacher that is trained first changes no
    number."""
    rows = _data("recipes.yaml")["recipes"]
    same = [x for x in rows if x.replace("-mmdet_", "_") == name]
    return rows.get(name) or (rows[same[0]] if same else {})


def measured_costs() -> List[Costs]:
    """What steps of recipes cost, as in ``docs/speed.md``."""
    return read_costs(_path("costs.json"))


@functools.cache
def _data(name: str) -> Dict[str, Any]:
    with open(_path(name)) as f:
        return yaml.safe_load(f)


def _path(name: str) -> str:
    return next(filter(os.path.isfile, (os.path.join(folder, name) for folder in _FOLDERS)))
