"""Every config key that d2kd adds to Detectron2's, and how config files are read."""

from typing import List, Sequence

from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config
from detectron2.config.compat import guess_version
from omegaconf import DictConfig

from d2kd.data.described import num_classes_described, resolve_datasets
from d2kd.errors import UserError
from d2kd.layers.precision import PRECISIONS
from d2kd.lazy import (
    checkpoints_kept,
    errors_in_lazy_words,
    is_python,
    load_program,
    refuse_incomplete,
    set_num_classes,
    target_of,
    test_size,
    to_text,
    values_of,
)
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.methods.core import drop_unregistered
from d2kd.model_zoo import resolve_config, run_folder
from d2kd.modeling import add_modeling_config
from d2kd.modeling.backbone import use_p7_without_relu
from d2kd.modeling.backbone.timm import use_timm_pixels
from d2kd.modeling.config import MODEL_KEYS
from d2kd.safe_yaml import read_value, read_yaml
from d2kd.schema import (
    Key,
    check_node,
    check_values,
    config_node,
    typed_opts,
    whole_numbers_as_floats,
)
from d2kd.yacs_errors import yacs_errors_explained

DISTILL_KEYS = {
    "METHODS": Key([], "The methods to train with, by name; none = the plain student", item=str),
    "TEACHER": {
        "CONFIG": Key(
            "", "The teacher's config: a file, a recipe of d2kd, or a name in Detectron2's zoo"
        ),
        "WEIGHTS": Key(
            "",
            "Its weights: a file, a URL, a detectron2:// or d2kd:// name; empty = the model zoo's "
            "for CONFIG, else what training CONFIG left, beside it or in output/, else its "
            "MODEL.WEIGHTS, else what d2kd ships",
        ),
        "OPTS": Key([], "Changes to the teacher's config: KEY VALUE KEY VALUE ...", item=object),
        "PRECISION": Key(
            "",
            "float32, float16 or bfloat16; empty = as the student runs",
            choices=("", *PRECISIONS),
        ),
        "FOLD_NORMS": Key(
            True, "Merge norms with fixed statistics into the convolutions before them"
        ),
        "CHANNELS_LAST": Key(True, "Keep weights and maps in the order N, H, W, C"),
        "COMPILE": Key(
            False, "Run backbone and towers through torch.compile; needs a C++ compiler"
        ),
    },
}

SOLVER_KEYS = {
    "OPTIMIZER": Key(
        "SGD",
        "The optimizer: SGD (Detectron2's own builder) or AdamW",
        choices=("SGD", "AdamW"),
    ),
    "CHANNELS_LAST": Key(
        False, "Keep the student's weights and maps in the order N, H, W, C while it trains"
    ),
    "ACCUMULATION_STEPS": Key(
        1,
        "Batches of SOLVER.IMS_PER_BATCH images in one step of the optimizer, with the mean of "
        "their gradients; iterations are steps of the optimizer",
        low=1,
    ),
    "EMA_DECAY": Key(
        0.0,
        "Above 0, an exponential moving average of the student is kept: after every step "
        "average = decay · average + (1 - decay) · student; it becomes model_ema.pth",
        low=0.0,
        below=1.0,
    ),
}

DATASETS_KEYS = {
    "DESCRIBED": Key(
        [],
        "Written by d2kd: the data sets that DATASETS.TRAIN and .TEST describe by their files",
        item=object,
    ),
}

# How a run is carried out; nothing here changes what it comes to
RUN_KEYS = {
    "TIMEOUT": Key(
        1800, "Seconds that the processes of a run wait for one that does not answer", low=1
    ),
    "SKIP_BAD_IMAGES": Key(
        0,
        "How many files that are no image each process of a run may skip, counted anew after a "
        "resume; more of them end it",
        low=0,
    ),
    "KEEP_CHECKPOINTS": Key(
        0, "How many of the numbered checkpoints stay, the newest ones; 0 = all", low=0
    ),
    "BEST_METRIC": Key(
        "bbox/AP",
        "The student with the highest value of this metric is kept as model_best.pth, where the "
        "run is evaluated every TEST.EVAL_PERIOD iterations; of several sets the first one's, or "
        "that of <set>/<metric>; empty = none is",
    ),
}

# Keys of 0.1.0 below DISTILL that have another name: the new name, and what else changed
_RENAMED = {
    "CROSSKD.TAP": ("CROSSKD.DEPTH", ""),
    "HGD.TAP": ("HGD.PRE_ACTIVATION", "'pre_relu' is True, 'post_relu' is False"),
    "HGD.BETA_S": ("HGD.SPATIAL_POWER", ""),
    "HGD.BETA_C": ("HGD.CHANNEL_POWER", ""),
    "HGD.GAP_GAMMA": ("HGD.GAP_POWER", ""),
    "HGD.FG_KAPPA": ("HGD.FOREGROUND", ""),
    "HGD.W_MAX": ("HGD.MAX_WEIGHT", ""),
    "HGD.ETA": ("HGD.MACRO_POWER", ""),
    "DEFEAT.SAMPLING": ("DEFEAT.PROPOSALS_FROM", ""),
    "DEFEAT.ASSIGN": ("DEFEAT.NECK_ASSIGN", "and DISTILL.DEFEAT.STAGE_ASSIGN"),
    "GDETKD.ROIS": ("GDETKD.PROPOSALS_FROM", ""),
    "GDETKD.PRE_RELU": ("GDETKD.PRE_ACTIVATION", ""),
}


def add_distill_config(cfg: CfgNode) -> None:
    """Adds d2kd's keys to a config made by ``detectron2.config.get_cfg``.

    ``MODEL`` describes the student, as in any Detectron2 config; ``DISTILL`` what teaches it.
    Each method's own node, ``DISTILL.<METHOD>``, is described in its file in ``d2kd/methods``.
    """
    add_modeling_config(cfg)
    cfg.SOLVER.update(config_node(SOLVER_KEYS))
    cfg.DATASETS.update(config_node(DATASETS_KEYS))
    cfg.RUN = config_node(RUN_KEYS)
    cfg.DISTILL = config_node(DISTILL_KEYS)
    for name, method in DISTILLER_REGISTRY:
        cfg.DISTILL[name.upper()] = method.default_config()
    for old, (new, also) in _RENAMED.items():
        cfg.register_renamed_key(f"DISTILL.{old}", f"DISTILL.{new}", also or None)


def default_config() -> CfgNode:
    """Detectron2's defaults with d2kd's keys."""
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg


def check_config(cfg: CfgNode) -> None:
    """
    Args:
        cfg: with the keys of :func:`add_distill_config`.

    Raises:
        UserError: if a value of d2kd's keys is of the wrong type or out of its range, or any value
            of the whole config is missing, NaN or infinite.
    """
    check_values(cfg, default_config())
    if cfg.MODEL.LOAD_PROPOSALS:  # a pickle, which Detectron2 reads by running what it says
        raise UserError(
            "MODEL.LOAD_PROPOSALS is True: files of proposals can run code when they are read; set "
            "it to False, and give the detector an RPN"
        )
    check_node(cfg.MODEL, MODEL_KEYS, "MODEL")
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        raise UserError(
            f"MODEL.PIXEL_STD has {len(cfg.MODEL.PIXEL_STD)} numbers and MODEL.PIXEL_MEAN "
            f"{len(cfg.MODEL.PIXEL_MEAN)}: give one per colour channel in both"
        )
    check_node(cfg.SOLVER, SOLVER_KEYS, "SOLVER")
    check_node(cfg.RUN, RUN_KEYS, "RUN")
    check_node(cfg.DISTILL, DISTILL_KEYS, "DISTILL")
    for _, method in DISTILLER_REGISTRY:
        method.check_config(method.node_of(cfg))


def read_config(name: str, opts: Sequence = (), opts_key: str = "command line") -> CfgNode:
    """A config with overrides, as ``d2kd train`` reads it.

    Args:
        name: a path, or the name of a recipe, or of a config in Detectron2's model zoo. A file that
            ends in ``.py`` is run.
        opts: KEY VALUE KEY VALUE ..., for a Python config ``path.key=value`` ...
        opts_key: where ``opts`` come from, for messages.

    Raises:
        UserError: if there is no such file; see also :func:`load_yaml` and :func:`load_lazy`.
    """
    cfg = default_config()
    path = resolve_config(name, "--config-file")
    load = load_lazy if is_python(path) else load_yaml
    load(cfg, path, opts, opts_key)
    return cfg


def load_lazy(cfg: CfgNode, path: str, opts: Sequence = (), opts_key: str = "command line") -> None:
    """Reads a Python config (LazyConfig) and overrides, and checks what YAML has as well.

    Args:
        cfg: of defaults, with d2kd's keys; changed in place. What builds model, data, optimizer
            and schedule comes to stand under ``LAZY``, see :mod:`d2kd.lazy`.
        path: the file. It is a program, and is run.
        opts: ``path.key=value`` ...
        opts_key: where ``opts`` come from, for messages.

    Raises:
        UserError: if the program fails or lacks something, or for what :func:`load_yaml` refuses.
    """
    program = load_program(path, opts, opts_key)
    refuse_incomplete(program, path)
    with errors_in_lazy_words():
        cfg.MODEL.META_ARCHITECTURE = _class_name(program.model, path)
        _use_defaults_of(cfg, cfg.MODEL.META_ARCHITECTURE)
        with yacs_errors_explained(cfg, f"{path} and {opts_key}" if opts else path):
            values = CfgNode(values_of(program))
            drop_unregistered(values.get("DISTILL"), DISTILL_KEYS, path)
            whole_numbers_as_floats(cfg, values)
            cfg.merge_from_other_cfg(values)
        kept = checkpoints_kept(program)
        problem = RUN_KEYS["KEEP_CHECKPOINTS"].problem(kept)
        if problem:
            raise UserError(f"train.checkpointer.max_to_keep is {kept!r}: {problem}")
        if kept:
            cfg.RUN.KEEP_CHECKPOINTS = min(kept, cfg.RUN.KEEP_CHECKPOINTS or kept)
        if test_size(program):
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = test_size(program)
        check_config(cfg)
        resolve_datasets(cfg)
        if num_classes_described(cfg):
            set_num_classes(program.model, num_classes_described(cfg))
        _set_output_dir(cfg, path)
        cfg.LAZY = to_text(program)


def _class_name(model: DictConfig, path: str) -> str:
    try:
        return target_of(model).__name__
    except (AttributeError, ImportError) as error:
        raise UserError(
            f"{path}: its 'model' is no call of a class: give L(...)(...) of a detector"
        ) from error


def load_yaml(cfg: CfgNode, path: str, opts: Sequence = (), opts_key: str = "command line") -> None:
    """Merges a YAML file (with its ``_BASE_``) and overrides into a config, and checks all values.

    Methods whose values differ by kind of student default to those of this one, the student has as
    many classes as a training set that is described by its files, a timm backbone brings its mean,
    std and channel order, and ``OUTPUT_DIR`` follows the file's place unless it is given.

    Args:
        cfg: changed in place; gets d2kd's keys if it lacks them.
        path: the file.
        opts: KEY VALUE KEY VALUE ...
        opts_key: where ``opts`` come from, for messages.

    Raises:
        UserError: for a key that does not exist or was renamed, a value of the wrong type or out
            of its range, or a broken file.
    """
    pythonic = [word for word in opts[::2] if "=" in str(word)]
    if pythonic:
        raise UserError(
            f"{opts_key}: '{pythonic[0]}' changes a Python config, but {path} is YAML: give KEY "
            "VALUE, such as SOLVER.MAX_ITER 1000"
        )
    if len(opts) % 2:
        raise UserError(f"{opts_key}: give pairs of KEY VALUE, not {len(opts)} words: {list(opts)}")
    opts = [read_value(word) if i % 2 else word for i, word in enumerate(opts)]
    if "DISTILL" not in cfg:
        add_distill_config(cfg)
    # Which architecture it is decides about defaults, which the file and the overrides come before.
    draft = cfg.clone()
    _merge(draft, path, opts, opts_key)
    _use_defaults_of(cfg, draft.MODEL.META_ARCHITECTURE)
    _merge(cfg, path, opts, opts_key)
    check_config(cfg)
    resolve_datasets(cfg)
    _set_num_classes(cfg, num_classes_described(cfg))
    use_timm_pixels(cfg)
    use_p7_without_relu(cfg)
    _set_output_dir(cfg, path)


def _use_defaults_of(cfg: CfgNode, architecture: str) -> None:
    """Gives the keys of every method the defaults that it has for a kind of student."""
    for _, method in DISTILLER_REGISTRY:
        method.use_defaults_of(method.node_of(cfg), architecture)


def _set_output_dir(cfg: CfgNode, path: str) -> None:
    if cfg.OUTPUT_DIR == get_cfg().OUTPUT_DIR:
        cfg.OUTPUT_DIR = run_folder(path)


def class_heads(cfg: CfgNode) -> List[str]:
    """The nodes below ``MODEL`` that tell the number of object classes, whichever one is built."""
    return [
        name
        for name, node in cfg.MODEL.items()
        if isinstance(node, CfgNode) and "NUM_CLASSES" in node and name != "SEM_SEG_HEAD"
    ]


def _set_num_classes(cfg: CfgNode, number: int) -> None:
    """In every head, so that whichever one the student has follows its data."""
    if number:
        for head in class_heads(cfg):
            cfg.MODEL[head].NUM_CLASSES = number


def _merge(cfg: CfgNode, path: str, opts: Sequence, opts_key: str) -> None:
    with yacs_errors_explained(cfg, path):
        _merge_file(cfg, path)
    with yacs_errors_explained(cfg, opts_key):
        cfg.merge_from_list(typed_opts(cfg, opts))


def _merge_file(cfg: CfgNode, path: str) -> None:
    """As ``cfg.merge_from_file`` does, but nothing in the file is run, and 0 is 0.0."""
    loaded = CfgNode(read_yaml(path))
    drop_unregistered(loaded.get("DISTILL"), DISTILL_KEYS, path)
    version = loaded.get("VERSION") or guess_version(loaded, path)
    merged = cfg if version == cfg.VERSION else downgrade_config(cfg, to_version=version)
    whole_numbers_as_floats(merged, loaded)
    merged.merge_from_other_cfg(loaded)
    if merged is not cfg:
        cfg.update(upgrade_config(merged))
