"""Image files that a user names, and some to try a detector on where the user names none."""

import glob
import os
from typing import List, Sequence

import matplotlib
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from PIL import Image

from d2kd.data.images import too_deep
from d2kd.data.sets import load_errors_explained
from d2kd.errors import UserError, reason

# The one photograph that every installation has
SAMPLE_PHOTOGRAPH = os.path.join(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")


def image_files(words: Sequence[str]) -> List[str]:
    """The files that a command line names, each once.

    Args:
        words: files, folders (of which those files are taken that have the ending of an image, but
            no hidden ones), or patterns such as ``photographs/*.jpg``.

    Raises:
        UserError: for a word that names nothing.
    """
    return list(dict.fromkeys(path for word in words for path in _files_of(word)))


def _files_of(word: str) -> List[str]:
    if os.path.isdir(word):
        found = _images_in(word)
        if not found:
            raise UserError(f"the folder {word} holds no image: give one that does")
        return found
    if os.path.isfile(word):
        return [word]
    found = sorted(filter(os.path.isfile, glob.glob(word, recursive=True)))
    if not found:
        raise UserError(f"{word} names no file and no folder: give images that are there")
    return found


def _images_in(folder: str) -> List[str]:
    endings = tuple(Image.registered_extensions())
    names = sorted(x for x in os.listdir(folder) if x.lower().endswith(endings) and x[0] != ".")
    return [os.path.join(folder, name) for name in names]


def images_at_hand(cfg: CfgNode, most: int) -> List[str]:
    """Images to try a detector on: of the first validation set if it is there, else a photograph
    that comes with matplotlib.

    Args:
        cfg: names the data sets.
        most: how many at most, spread over the set.
    """
    for name in cfg.DATASETS.TEST[:1]:
        folder = MetadataCatalog.get(name).get("image_root", "")
        found = _images_of(name) or (_images_in(folder) if os.path.isdir(folder) else [])
        if found:
            return found[:: -(-len(found) // most)]
    return [SAMPLE_PHOTOGRAPH]


def _images_of(dataset_name: str) -> List[str]:
    try:
        with load_errors_explained([dataset_name]):
            paths = [d["file_name"] for d in DatasetCatalog.get(dataset_name)]
    except UserError:
        return []
    return list(filter(os.path.isfile, paths))


def read_image(path: str, input_format: str) -> np.ndarray:
    """
    Args:
        path: a file of any format that Pillow reads; its EXIF orientation is applied.
        input_format: the order of the channels, ``INPUT.FORMAT``.

    Returns:
        (H, W, C), uint8.

    Raises:
        UserError: if the file is no image, or has more than 8 bits per channel.
    """
    deep = too_deep(path)
    if deep:
        raise UserError(f"{path} {deep.message}")
    try:
        return detection_utils.read_image(path, format=input_format)
    except Exception as error:  # whatever a decoder makes of a broken file
        raise UserError(f"{path} cannot be read as an image: {reason(error)}") from error
