"""Names of the data sets that d2kd brings: shapes_tiny_{train,val} and shapes_{train,val}.

COCO and VOC are registered by Detectron2 itself. All lie under ``DETECTRON2_DATASETS``, or
``./datasets`` without it.
"""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .shapes import SPECS, SPLITS, ShapesSpec
from .shapes_files import annotation_file, prepare_shapes


def datasets_root() -> str:
    """The folder that holds all data sets, found as Detectron2 finds it."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_shapes(spec: ShapesSpec, root: str) -> None:
    """Registers ``<name>_train`` and ``<name>_val``; nothing happens for names that are there.

    The files are drawn under ``root`` when a split is first asked for, not now.
    """
    folder = os.path.join(root, spec.name)
    for split in SPLITS:
        name = f"{spec.name}_{split}"
        if name not in DatasetCatalog:
            _register_split(name, spec, folder, split)


def _register_split(name: str, spec: ShapesSpec, folder: str, split: str) -> None:
    json_file, image_root = annotation_file(folder, split), os.path.join(folder, split)

    def load():
        prepare_shapes(spec, folder)
        return load_coco_json(json_file, image_root, name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(spec.classes),
    )


def register_all(root: str) -> None:
    """Registers every data set of this file under a root folder."""
    for spec in SPECS.values():
        register_shapes(spec, root)
