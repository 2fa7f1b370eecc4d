"""Where configs and weights are found: the shipped recipes, the shipped weights, and Detectron2's
model zoo."""

import difflib
import glob
import itertools
import os
import re
from pathlib import Path
from typing import List, Optional

import detectron2
from detectron2 import model_zoo
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from d2kd.errors import UserError

_D2KD, _DETECTRON2 = (os.path.dirname(os.path.abspath(p)) for p in (__file__, detectron2.__file__))
_ASSETS = os.path.join(_D2KD, "assets")
# Both have their configs inside the package when installed, beside it in a checkout.
CONFIG_DIRS = (os.path.join(_D2KD, "configs"), os.path.join(os.path.dirname(_D2KD), "configs"))
ZOO_DIRS = (
    os.path.join(_DETECTRON2, "model_zoo", "configs"),
    os.path.join(os.path.dirname(_DETECTRON2), "configs"),
)
# The last checkpoint of a run
FINAL_WEIGHTS = "model_final.pth"


def resolve_config(name: str, key: str) -> str:
    """The path of a config file.

    Args:
        name: a path, or a name relative to d2kd's ``configs`` or to Detectron2's model zoo. The
            ending of a YAML file may be left out.
        key: the config key or option that named it, for the message.

    Raises:
        UserError: if there is no such file.
    """
    for named in (name, f"{name}.yaml"):
        path = named if os.path.isfile(named) else find_config(named)
        if path:
            return path
    close = difflib.get_close_matches(name.removesuffix(".yaml"), _recipe_names(), n=1)
    meant = f"; did you mean '{close[0]}'?" if close else ""
    raise UserError(
        f"{key} is '{name}': no such file, neither here, nor among d2kd's configs "
        f"({CONFIG_DIRS[-1]}), nor in Detectron2's model zoo ({ZOO_DIRS[0]}){meant}"
    )


def _recipe_names() -> List[str]:
    """Of all configs that are named without their folder's path, without their ending."""
    found = (Path(folder).rglob("*.yaml") for folder in (*CONFIG_DIRS, *ZOO_DIRS))
    return [config_name(str(path)).removesuffix(".yaml") for path in itertools.chain(*found)]


def find_config(name: str) -> Optional[str]:
    """The path of a recipe, or of a config in Detectron2's model zoo, by its name; None if there is
    none."""
    paths = (os.path.join(folder, name) for folder in (*CONFIG_DIRS, *ZOO_DIRS))
    return next(filter(os.path.isfile, paths), None)


def zoo_weights(path: str) -> str:
    """Address of the model zoo's weights for a config.

    Args:
        path: where :func:`resolve_config` found it.

    Returns:
        "" if the config is not the zoo's, or the zoo has no weights for it.
    """
    if not path.startswith(ZOO_DIRS):
        return ""
    try:
        return model_zoo.get_checkpoint_url(config_name(path))
    except RuntimeError:  # Detectron2's answer for a config without a trained model
        return ""


def zoo_teachers() -> List[str]:
    """The configs of Detectron2's model zoo that have the weights of a detector on COCO, by name
    without ending."""
    paths = [path for x in ZOO_DIRS for path in glob.glob(os.path.join(x, "COCO-*", "*.yaml"))]
    names = {os.path.splitext(config_name(path))[0]: path for path in paths}
    return sorted(
        name
        for name, path in names.items()
        if not re.search("Panoptic|/rpn_|/fast_rcnn_", name) and zoo_weights(path)
    )


def recipe_name(path: str) -> str:
    """``shapes/frs/fcos_tiny`` for that recipe; the bare file name for a config from elsewhere.

    Args:
        path: of a config file, from :func:`resolve_config`.
    """
    stem = os.path.splitext(os.path.abspath(path))[0]
    for folder in CONFIG_DIRS:
        if stem.startswith(folder + os.sep):
            return os.path.relpath(stem, folder)
    return os.path.basename(stem)


def config_name(path: str) -> str:
    """What ``--config-file`` finds a config by: the name of a recipe, or of a config in the model
    zoo, with its ending; else the path from the current folder.

    Args:
        path: of a config file, from :func:`resolve_config`.
    """
    for folder in (*CONFIG_DIRS, *ZOO_DIRS):
        if os.path.abspath(path).startswith(folder + os.sep):
            return os.path.relpath(path, folder)
    return os.path.relpath(path)


def run_folder(path: str) -> str:
    """Where a config is trained if it does not say so: ``output/<its name>``."""
    return f"output/{recipe_name(path)}"


def trained_weights(path: str) -> str:
    """What training a config left: beside it, if it lies in a run's folder, or at its usual place;
    "" if it has not been trained."""
    folders = (os.path.dirname(path), run_folder(path))
    weights = (os.path.join(folder, FINAL_WEIGHTS) for folder in folders)
    return next(filter(os.path.isfile, weights), "")


def shipped_weights(path: str) -> str:
    """Address of the weights that come with d2kd for one of its recipes; "" if there are none."""
    name = f"{os.path.basename(recipe_name(path))}.pth"
    ours = path.startswith(CONFIG_DIRS) and os.path.isfile(os.path.join(_ASSETS, name))
    return f"{_AssetHandler.PREFIX}{name}" if ours else ""


class _AssetHandler(PathHandler):
    """Makes ``d2kd://<file>`` name a file that comes with the package."""

    PREFIX = "d2kd://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        return os.path.join(_ASSETS, path[len(self.PREFIX) :])

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._get_local_path(path), mode, buffering=buffering)

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._get_local_path(path))

    _exists = _isfile


PathManager.register_handler(_AssetHandler(), allow_override=True)
