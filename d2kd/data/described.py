"""Data sets of one's own: entries of ``DATASETS.TRAIN`` and ``.TEST`` that say where the files are.

An entry is registered under a name made of the content of its annotations, so that another file
never passes for the one that a run was trained with. What is registered stands in
``DATASETS.DESCRIBED``, from which every process of a run, and every later command, registers it
again.
"""

import functools
import hashlib
import json
import logging
import os
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from d2kd.errors import UserError

from .images import refuse_outside
from .sets import no_json
from .voc import load_voc, open_voc, split_file
from .yolo import load_yolo, open_split

_logger = logging.getLogger(__name__)

_EXAMPLE = (
    "{json: instances_train.json, images: images}, {voc: folder, split: trainval} or "
    "{yolo: data.yaml, split: train}"
)


class _Annotations(NamedTuple):
    digest: str  # of the file's bytes
    classes: Tuple[str, ...]  # in the order in which the detector numbers them


def resolve_datasets(cfg: CfgNode) -> None:
    """Registers the described entries of ``DATASETS.TRAIN`` and ``.TEST``, and puts their names in
    their place.

    Args:
        cfg: changed in place: names for entries, and ``DATASETS.DESCRIBED``.

    Raises:
        UserError: for an entry that is neither a name nor a description, or whose file cannot be
            read, or is that of another entry with other images.
    """
    named = [entry for entry in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if isinstance(entry, str)]
    described = {entry["name"]: entry for entry in _entries(cfg) if entry["name"] in named}
    for split in ("TRAIN", "TEST"):
        key, names = f"DATASETS.{split}", []
        for entry in cfg.DATASETS[split]:
            if isinstance(entry, Mapping):
                entry = _described(entry, key)
                if described.setdefault(entry["name"], entry) != entry:
                    place = next(entry[k] for k in ("images", "voc", "yolo") if k in entry)
                    raise UserError(
                        f"{key}: the same annotations as those of another entry, with images in "
                        f"another folder ({place}): give each set its own annotations"
                    )
                entry = entry["name"]
            if not isinstance(entry, str):
                raise UserError(f"{key} has {entry!r}: give names of data sets, or {_EXAMPLE}")
            names.append(entry)
        cfg.DATASETS[split] = tuple(names)
    cfg.DATASETS.DESCRIBED = list(described.values())
    register_described(cfg)


def register_described(cfg: CfgNode) -> None:
    """Makes the names of ``DATASETS.DESCRIBED`` known in this process. No file is read before the
    data are asked for."""
    for entry in _entries(cfg):
        _register(**entry)


def num_classes_described(cfg: CfgNode) -> int:
    """How many classes the described training set has, 0 if there is none."""
    names = cfg.DATASETS.TRAIN
    counts = [len(entry["classes"]) for entry in _entries(cfg) if entry["name"] in names]
    return counts[0] if counts else 0


def _entries(cfg: CfgNode) -> List[Dict[str, Any]]:
    known = [{"name", *keys, "classes"} for keys in _FORMATS]
    for entry in cfg.DATASETS.DESCRIBED:
        if not isinstance(entry, Mapping) or set(entry) not in known:
            raise UserError(
                f"DATASETS.DESCRIBED has {entry!r:.60}: it is written by d2kd; describe data sets "
                f"in DATASETS.TRAIN and DATASETS.TEST, as {_EXAMPLE}"
            )
    return [dict(entry) for entry in cfg.DATASETS.DESCRIBED]


def _described(entry: Mapping[str, Any], key: str) -> Dict[str, Any]:
    known = frozenset(entry) in _FORMATS
    if not known or not all(isinstance(value, str) for value in entry.values()):
        raise UserError(f"{key} has {dict(entry)!r:.80}: give a name, or {_EXAMPLE}")
    return _FORMATS[frozenset(entry)].describe(key, **entry)


def _describe_coco(key: str, json: str, images: str) -> Dict[str, Any]:
    path, images = (os.path.abspath(os.path.expanduser(p)) for p in (json, images))
    if not os.path.isfile(path):
        raise UserError(f"{key}: {path} does not exist: give the annotations, COCO's instances")
    if not os.path.isdir(images):
        raise UserError(f"{key}: {images} is no folder: give the folder of the images")
    status = os.stat(path)
    found = _read(path, status.st_mtime_ns, status.st_size)
    stem = os.path.splitext(os.path.basename(path))[0]
    name = f"{stem}_{found.digest[:8]}"
    return {"name": name, "json": path, "images": images, "classes": list(found.classes)}


def _describe_voc(key: str, voc: str, split: str) -> Dict[str, Any]:
    folder = os.path.abspath(os.path.expanduser(voc))
    names = split_file(folder, split)
    annotations = os.path.join(folder, "Annotations")
    for path, is_there in ((names, os.path.isfile), (annotations, os.path.isdir)):
        if not is_there(path):
            raise UserError(
                f"{key}: {path} does not exist: give a folder laid out as Pascal VOC's, with "
                "Annotations, ImageSets/Main and JPEGImages"
            )
    found = open_voc(names, annotations, os.stat(names).st_mtime_ns)
    name = f"{os.path.basename(folder)}_{split}_{found.digest[:8]}"
    return {"name": name, "voc": folder, "split": split, "classes": list(found.classes)}


def _describe_yolo(key: str, yolo: str, split: str) -> Dict[str, Any]:
    path = os.path.abspath(os.path.expanduser(yolo))
    if not os.path.isfile(path):
        raise UserError(
            f"{key}: {path} does not exist: give the YAML that names classes and images"
        )
    found = open_split(path, split)
    stem = os.path.splitext(os.path.basename(path))[0]
    name = f"{stem}_{split}_{found.digest[:8]}"
    return {"name": name, "yolo": path, "split": split, "classes": list(found.classes)}


@functools.lru_cache(maxsize=16)
def _read(path: str, mtime: int, size: int) -> _Annotations:
    """Once per state of a file."""
    with open(path, "rb") as f:
        content = f.read()
    try:
        data = json.loads(content)
        categories = sorted(data["categories"], key=lambda category: category["id"])
        classes = tuple(category["name"] for category in categories)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} {no_json(error)}") from error
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} has no 'categories' with 'id' and 'name': is it in COCO's instances format?"
        ) from error
    if not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path} names no class: give 'categories' with 'id' and 'name'")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{path} has two categories of the name '{twice}': rename one")
    return _Annotations(hashlib.sha256(content).hexdigest(), classes)


def _register(name: str, classes: List[str], **files: str) -> None:
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("files") == files:
            return
        DatasetCatalog.remove(name)  # the same annotations with their images at another place
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, functools.partial(_load, name, files, list(classes)))
    MetadataCatalog.get(name).set(
        **_FORMATS[frozenset(files)].places(**files),
        files=files,
        evaluator_type="coco",
        thing_classes=list(classes),
    )


def _load(name: str, files: Mapping[str, str], classes: List[str]) -> List[Dict[str, Any]]:
    """The dicts of a set, with a warning if its annotations are no longer those of its name."""
    dicts = _FORMATS[frozenset(files)].load(name=name, classes=classes, **files)
    digest = _digest_now(name, files)
    if not name.endswith(f"_{digest[:8]}"):
        _logger.warning(
            f"The annotations of {name} ({', '.join(files.values())}) have changed since they got "
            f"that name: they are read as they are now ({digest[:8]})"
        )
    return dicts


def _digest_now(name: str, files: Mapping[str, str]) -> str:
    if "json" in files:  # not parsed, since it may be large
        with open(files["json"], "rb") as f:
            return hashlib.sha256(f.read()).hexdigest()
    return _FORMATS[frozenset(files)].describe(name, **files)["name"].rpartition("_")[2]


def _load_coco(name: str, classes: List[str], json: str, images: str) -> List[Dict[str, Any]]:
    logger = logging.getLogger("detectron2.data.datasets.coco")
    logger.addFilter(_is_news)
    try:
        dicts = load_coco_json(json, images, name)
    finally:
        logger.removeFilter(_is_news)
    refuse_outside(dicts, [images], json)  # here, so that every command does
    return dicts


def _is_news(record: logging.LogRecord) -> bool:
    """Detectron2 warns of category ids with gaps, which it maps: here they are quite usual."""
    return "Category ids in annotations" not in record.getMessage()


def _load_voc(name: str, classes: List[str], voc: str, split: str) -> List[Dict[str, Any]]:
    return load_voc(voc, split, classes)


def _load_yolo(name: str, classes: List[str], yolo: str, split: str) -> List[Dict[str, Any]]:
    return load_yolo(yolo, split)


class _Format(NamedTuple):
    """How a kind of entries is described, loaded, and where its files are."""

    describe: Callable[..., Dict[str, Any]]  # of the config's key and the entry
    load: Callable[..., List[Dict[str, Any]]]  # of name, classes and the entry
    places: Callable[..., Dict[str, str]]  # of the entry: what Detectron2's metadata call them


# By the keys of an entry
_FORMATS = {
    frozenset(("json", "images")): _Format(
        _describe_coco, _load_coco, lambda json, images: {"json_file": json, "image_root": images}
    ),
    frozenset(("voc", "split")): _Format(
        _describe_voc, _load_voc, lambda voc, split: {"image_root": os.path.join(voc, "JPEGImages")}
    ),
    frozenset(("yolo", "split")): _Format(_describe_yolo, _load_yolo, lambda yolo, split: {}),
}
