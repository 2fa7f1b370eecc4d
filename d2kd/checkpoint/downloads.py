"""Files that come from the network: what to do without one, and proof that they arrived whole."""

import hashlib
import logging
import os
import re
from urllib.parse import urlparse

from detectron2.utils.file_io import Detectron2Handler
from iopath.common.file_io import get_cache_dir

from .files import Unreadable

logger = logging.getLogger(__name__)

# torchvision and MMDetection publish "<name>-<first digits of the file's SHA-256>.pth". The digits
# in names of Detectron2's model zoo are documented nowhere.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")


def is_address(path: str) -> bool:
    """Whether a path names something on the network (or in an archive of a library)."""
    return "://" in path


def offline_advice(address: str, key: str) -> str:
    """What to do when an address cannot be reached.

    Args:
        address: what was asked for.
        key: the config key that gave it.
    """
    url = address.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX, 1)
    if not url.startswith(("http://", "https://")):
        return f"give the path of a file as {key}"
    cached = os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))
    return f"download {url} elsewhere, and put it at {cached} or give its path as {key}"


def check_hash(path: str, downloaded: bool) -> None:
    """Compares a file with the hash in its name, if there is one.

    Args:
        path: of the local disk.
        downloaded: whether it came from the network. A file that the user put there is read
            nevertheless, with a warning.

    Raises:
        Unreadable: if a downloaded file differs.
    """
    match = _HASH_IN_NAME.search(path)
    if match is None or not os.path.isfile(path):
        return
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(1 << 20), b""):
            sha.update(chunk)
    if sha.hexdigest().startswith(match[1]):
        return
    if downloaded:
        raise Unreadable(
            f"the download is damaged: the SHA-256 of {path} is {sha.hexdigest()[:8]}..., not "
            f"{match[1]}... as its name says; delete it and start again"
        )
    logger.warning(f"{path} is not as it was published: its SHA-256 is not that of its name")
