"""What is wrong with the files of images: each is read as training would read it."""

import os
from typing import Any, Iterable, List, Mapping, Optional, Sequence, Tuple

from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from d2kd.errors import UserError, reason

from .findings import ERROR, WARNING, Finding

# Pillow's modes of more than 8 bits per channel, of which Detectron2 makes white where they exceed
# 255. (A colour PNG of 16 bits is none of these: Pillow keeps its upper 8.)
_DEEP = ("I", "F")
EXIF_ORIENTATION = 0x0112  # the tag
SIDEWAYS = (5, 6, 7, 8)  # its values that swap width and height

# Of the files that are looked for in a folder of images
ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Width over height, or height over width, from which resizing may leave nothing of an image
_STRIP = 50
A_STRIP = "image that is a strip"


def too_deep(path: str) -> Optional[Finding]:
    """Whether Detectron2 would make white of an image in silence. Only its header is read.

    Args:
        path: of an image.

    Returns:
        None also if it cannot be opened, which reading it will say.
    """
    try:
        with PathManager.open(path, "rb") as f, Image.open(f) as image:
            mode = image.mode
    except Exception:
        return None
    if not mode.startswith(_DEEP):
        return None
    return Finding(
        "image of 16 bits",
        ERROR,
        path,
        f"has more than 8 bits per channel (Pillow's mode {mode}), of which Detectron2 would make "
        "white: write it with 8 bits, scaled as you choose",
    )


def refuse_outside(dicts: Iterable[Mapping[str, Any]], folders: Sequence[str], source: str) -> None:
    """
    Args:
        dicts: in Detectron2's format.
        folders: that all images are below.
        source: where the dicts come from, for the message.

    Raises:
        UserError: for an image that is elsewhere.
    """
    below = tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)
    for path in (d["file_name"] for d in dicts if "file_name" in d):
        if not os.path.abspath(path).startswith(below):
            raise UserError(
                f"{source}: image '{path}' is outside of the image folder {' or '.join(folders)}: "
                "correct 'file_name' in the annotation file, or register the folder of all images"
            )


def check_image(entry: Mapping[str, Any]) -> Optional[Finding]:
    """
    Args:
        entry: a dict in Detectron2's format.

    Returns:
        why its image cannot be used, or what is odd about it; None if it can, or if the dict names
        none.
    """
    path = entry.get("file_name")
    if path is None:
        return None
    found = _unopened(path) or too_deep(path) or _unreadable_or_odd(path, entry)
    return found._replace(image=entry.get("image_id")) if found else None


def _unopened(path: str) -> Optional[Finding]:
    if not PathManager.isfile(path):
        return Finding("image missing", ERROR, path, "does not exist")
    with PathManager.open(path, "rb") as f:
        empty = not f.read(1)
    return Finding("image of 0 bytes", ERROR, path, "is empty: copy it again") if empty else None


def _unreadable_or_odd(path: str, entry: Mapping[str, Any]) -> Optional[Finding]:
    try:
        with PathManager.open(path, "rb") as f, Image.open(f) as image:
            orientation, raw = image.getexif().get(EXIF_ORIENTATION, 1), image.size
        height, width = read_image(path, "BGR").shape[:2]
    except UnidentifiedImageError:
        return Finding("file that is no image", ERROR, path, "is no image that Pillow knows")
    except Exception as error:  # whatever a decoder makes of a broken file
        text = f"is damaged ({reason(error)})"
        return Finding("image that cannot be decoded", ERROR, path, text)
    expected = (entry.get("width", width), entry.get("height", height))
    if expected != (width, height):
        kind, text = _other_size((width, height), expected, raw, orientation)
        return Finding(kind, ERROR, path, text)
    if max(width, height) > _STRIP * min(width, height):
        text = f"is {width} x {height}: resized to a training size, nothing may be left of it"
        return Finding(A_STRIP, WARNING, path, text)
    if orientation in (*range(2, 9),):
        text = f"EXIF orientation {orientation} is applied on reading: its boxes must be of the "
        return Finding("image with an EXIF orientation", WARNING, path, text + "upright image")
    return None


def _other_size(found: tuple, expected: tuple, raw: tuple, orientation: int) -> Tuple[str, str]:
    """Kind and text."""
    sizes = f"is {found[0]} x {found[1]}, its annotations say {expected[0]} x {expected[1]}"
    if orientation in SIDEWAYS and expected == raw:
        text = (
            f"{sizes}, the size before its EXIF orientation {orientation} is applied: turn the "
            "pixels and remove the tag, or annotate the upright image"
        )
        return "image turned by EXIF", text
    return "image of another size", f"{sizes}: correct 'width' and 'height'"


class _Images(Dataset):
    def __init__(self, dicts: Sequence[Mapping[str, Any]]):
        self.dicts = dicts

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, index: int) -> Optional[Finding]:
        return check_image(self.dicts[index])


def check_images(
    dicts: Sequence[Mapping[str, Any]], processes: int = 0, name: str = ""
) -> List[Finding]:
    """Opens every image, with a bar of progress where there is a terminal.

    Args:
        dicts: in Detectron2's format.
        processes: that open images beside this one; 0 opens them in this one.
        name: of the data set, for the bar.
    """
    loader = DataLoader(_Images(dicts), batch_size=None, num_workers=processes)
    found = tqdm(loader, total=len(dicts), desc=name, unit="image", disable=None)
    return [finding for finding in found if finding is not None]
