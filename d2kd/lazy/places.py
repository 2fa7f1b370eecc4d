"""Where a Python config has what Detectron2's YAML configs have, and messages that say so."""

import contextlib
import re
from typing import Any, Dict, Iterator

from omegaconf import DictConfig, OmegaConf

from d2kd.errors import UserError
from d2kd.schema import set_value

# Detectron2's YAML key -> where a Python config has it
PLACES = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "CUDNN_BENCHMARK": "train.cudnn_benchmark",
    "MODEL.DEVICE": "train.device",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "MODEL.KEYPOINT_ON": "dataloader.train.mapper.use_keypoint",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.ACCUMULATION_STEPS": "train.accumulation_steps",
    "SOLVER.EMA_DECAY": "train.ema_decay",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATASETS.DESCRIBED": "dataloader.described",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
}
# Of those that are d2kd's own, the defaults
OWN_DEFAULTS = {
    "DATASETS.DESCRIBED": [],
    "SOLVER.ACCUMULATION_STEPS": 1,
    "SOLVER.EMA_DECAY": 0.0,
}
# d2kd's own nodes -> their name in a Python config, with the same keys below
NODES = {"DISTILL": "distill", "RUN": "run"}
# What messages speak of, beside these
_WORDS = {
    **PLACES,
    "SOLVER.CLIP_GRADIENTS.ENABLED True": "an optimizer that clips gradients",
    "SOLVER.BASE_LR": "optimizer.lr",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "MODEL.META_ARCHITECTURE": "model",
}


def values_of(config: DictConfig) -> Dict[str, Any]:
    """What a Python config says of :data:`PLACES` and :data:`NODES`, as a tree of the YAML keys."""
    tree: Dict[str, Any] = {}
    for key, place in {**PLACES, **NODES}.items():
        value = OmegaConf.select(config, place, default=None)
        if value is None:
            continue
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if key in ("DATASETS.TRAIN", "DATASETS.TEST"):
            value = (value,) if isinstance(value, (str, dict)) else tuple(value)
        set_value(tree, key, value)
    return tree


def in_lazy_words(message: str) -> str:
    """A message that speaks of YAML's keys, in the words of a Python config."""
    names = "|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True))
    # What stands in quotes is to be typed: 'MODEL.DEVICE cpu'
    message = re.sub(rf"'({names}) (\S+)'", lambda m: f"'{_WORDS[m[1]]}={m[2]}'", message)
    message = re.sub(rf"(?<![\w.])({names})(?![\w])", lambda m: _WORDS[m[1]], message)
    for key, place in NODES.items():
        message = re.sub(rf"(?<![\w.]){key}\.(?=[A-Z])", f"{place}.", message)
    return message


@contextlib.contextmanager
def errors_in_lazy_words() -> Iterator[None]:
    """Lets the messages of errors speak of the keys of a Python config."""
    try:
        yield
    except UserError as error:
        raise UserError(in_lazy_words(str(error))) from error
