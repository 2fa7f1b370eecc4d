"""Where configs and weights are found: the shipped recipes, the shipped weights, and Detectron2's
model zoo."""

import os

import detectron2
from detectron2 import model_zoo
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from d2kd.errors import UserError

_D2KD, _DETECTRON2 = (os.path.dirname(os.path.abspath(p)) for p in (__file__, detectron2.__file__))
# Both have their configs inside the package when installed, beside it in a checkout.
CONFIG_DIRS = (os.path.join(_D2KD, "configs"), os.path.join(os.path.dirname(_D2KD), "configs"))
ZOO_DIRS = (
    os.path.join(_DETECTRON2, "model_zoo", "configs"),
    os.path.join(os.path.dirname(_DETECTRON2), "configs"),
)


def resolve_config(name: str, key: str) -> str:
    """The path of a config file.

    Args:
        name: a path, or a name relative to d2kd's ``configs`` or to Detectron2's model zoo.
        key: the config key or option that named it, for the message.

    Raises:
        UserError: if there is no such file.
    """
    for folder in ("", *CONFIG_DIRS, *ZOO_DIRS):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    raise UserError(
        f"{key} is '{name}': no such file, neither here, nor among d2kd's configs "
        f"({CONFIG_DIRS[-1]}), nor in Detectron2's model zoo ({ZOO_DIRS[0]})"
    )


def zoo_weights(name: str, path: str) -> str:
    """Address of the model zoo's weights for a config.

    Args:
        name: of the config, as the user wrote it.
        path: where :func:`resolve_config` found it.

    Returns:
        "" if the config is not the zoo's, or the zoo has no weights for it.
    """
    if not path.startswith(ZOO_DIRS):
        return ""
    try:
        return model_zoo.get_checkpoint_url(name)
    except RuntimeError:  # Detectron2's answer for a config without a trained model
        return ""


class _AssetHandler(PathHandler):
    """Makes ``d2kd://<file>`` name a file that comes with the package."""

    PREFIX = "d2kd://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        return os.path.join(_D2KD, "assets", path[len(self.PREFIX) :])

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._get_local_path(path), mode, buffering=buffering)

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._get_local_path(path))

    _exists = _isfile


PathManager.register_handler(_AssetHandler(), allow_override=True)
