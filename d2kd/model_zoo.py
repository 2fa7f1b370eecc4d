"""Where configs and weights are found: the shipped recipes, the shipped weights, and Detectron2's
model zoo."""

import os

from detectron2 import model_zoo
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from d2kd.errors import UserError

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
# The recipes lie beside the package in a checkout, inside it when installed.
CONFIG_DIRS = (
    os.path.join(_PACKAGE, "configs"),
    os.path.join(os.path.dirname(_PACKAGE), "configs"),
)


def resolve_config(name: str, key: str) -> str:
    """The path of a config file.

    Args:
        name: a path, or a name relative to d2kd's ``configs`` or to Detectron2's model zoo.
        key: the config key or option that named it, for the message.

    Raises:
        UserError: if there is no such file.
    """
    for folder in ("", *CONFIG_DIRS):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        raise UserError(
            f"{key} is '{name}': no such file, neither here, nor among d2kd's configs "
            f"({CONFIG_DIRS[-1]}), nor in Detectron2's model zoo"
        ) from None


def zoo_weights(name: str, path: str) -> str:
    """Address of the model zoo's weights for a config.

    Args:
        name: of the config, as the user wrote it.
        path: where :func:`resolve_config` found it.

    Returns:
        "" if the config is not the zoo's, or the zoo has no weights for it.
    """
    try:
        return model_zoo.get_checkpoint_url(name) if path == model_zoo.get_config_file(name) else ""
    except RuntimeError:  # Detectron2's answer for a config that it does not have, or not trained
        return ""


class _AssetHandler(PathHandler):
    """Makes ``d2kd://<file>`` name a file that comes with the package."""

    PREFIX = "d2kd://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        return os.path.join(_PACKAGE, "assets", path[len(self.PREFIX) :])

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._get_local_path(path), mode, buffering=buffering)

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._get_local_path(path))

    _exists = _isfile


PathManager.register_handler(_AssetHandler(), allow_override=True)
