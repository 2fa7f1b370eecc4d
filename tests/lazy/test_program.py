"""Reading and changing Python configs, what they are as text, and messages about them."""

import functools

import pytest
from detectron2.config import LazyCall, LazyConfig
from omegaconf import OmegaConf
from torch import nn

from d2kd.config import read_config
from d2kd.errors import UserError
from d2kd.lazy import (
    comparable,
    lazy_config,
    load_program,
    python_overrides,
    set_num_classes,
    to_program,
    to_text,
)

FRS = "shapes/frs/fcos_tiny_lazy.py"


def test_what_yaml_has_as_well_comes_from_its_place_in_python():
    cfg = read_config(FRS, ["train.max_iter=7", "distill.FRS.CLS.WEIGHT=0.5"])
    assert cfg.SOLVER.MAX_ITER == 7 and cfg.SOLVER.IMS_PER_BATCH == 8 and cfg.SEED == 1
    assert cfg.DATASETS.TRAIN == ("shapes_tiny_train",) and cfg.INPUT.FORMAT == "BGR"
    assert cfg.MODEL.META_ARCHITECTURE == "FCOS" and "output/" + FRS[:-3] == cfg.OUTPUT_DIR
    assert cfg.DISTILL.METHODS == ["FRS"] and cfg.DISTILL.FRS.CLS.WEIGHT == 0.5
    yaml = read_config("shapes/frs/fcos_tiny.yaml", ["DISTILL.FRS.CLS.WEIGHT", 0.5])
    assert cfg.DISTILL == yaml.DISTILL


def test_the_python_config_of_a_run_has_what_its_cfgnode_says():
    cfg = read_config(FRS)
    cfg.SOLVER.MAX_ITER, cfg.MODEL.WEIGHTS, cfg.DATASETS.TRAIN = 5, "x.pth", ("a", "b")
    config = lazy_config(cfg)
    assert config.train.max_iter == 5 and config.train.init_checkpoint == "x.pth"
    assert config.dataloader.train.dataset.names == ["a", "b"]
    assert config.distill.FRS.CLS.WEIGHT == cfg.DISTILL.FRS.CLS.WEIGHT


WRONG = {
    "train.max_iters=3": "no config key train.max_iters: did you mean 'train.max_iter'?",
    "train.max_iter=ten": "train.max_iter is 'ten': give a whole number",
    "train.max_iter=[3": "'train.max_iter=[3'",
    "distill.FRS.CLS.WIEGHT=1.0": "distill.FRS.CLS.WIEGHT: did you mean 'distill.FRS.CLS.WEIGHT'?",
    "distill.FRS.CLS.WEIGHT=-1.0": "distill.FRS.CLS.WEIGHT is -1.0: give 0 or more",
    "SOLVER.MAX_ITER": "'SOLVER.MAX_ITER' does not change a Python config: give path.key=value, "
    "such as train.max_iter=",
    "dataloader.evaluator=null": "has a dataloader.test without dataloader.evaluator",
    "model=null": "defines no 'model'",
    "model._target_=nobody.Knows": "its 'model' is no call of a class",
}


@pytest.mark.parametrize("word, message", WRONG.items(), ids=WRONG)
def test_a_wrong_change_is_one_line_in_the_words_of_python_configs(word, message):
    with pytest.raises(UserError) as error:
        read_config(FRS, [word])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_change_in_the_syntax_of_the_other_kind_is_refused():
    with pytest.raises(UserError, match="'train.max_iter=3' changes a Python config, but .*YAML"):
        read_config("shapes/frs/fcos_tiny.yaml", ["train.max_iter=3", "train.seed=1"])


def test_a_program_that_fails_is_one_line(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("model = dict(\n\n1 / 0)\n")
    with pytest.raises(UserError, match=r"config\.py: ZeroDivisionError: division by zero"):
        load_program(str(path))
    path.write_text("from .other import model\n")
    with pytest.raises(UserError, match=r"config\.py: ImportError.*other\.py"):
        load_program(str(path))


def test_yaml_cannot_bring_a_program(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("LAZY: 'x: !!python/object/apply:os.getcwd []'\n")
    with pytest.raises(UserError, match="no config key LAZY"):
        read_config(str(path))


def test_keys_of_yaml_have_a_place_in_python():
    data = [{"json": "/a b/c.json", "images": '/d"e'}]
    opts = ["OUTPUT_DIR", "/x y", "DATASETS.TRAIN", repr(data), "DISTILL.METHODS", "[]", "a.b=3"]
    words = python_overrides("x.py", opts)
    config = OmegaConf.create({"a": {"b": 1}})
    LazyConfig.apply_overrides(config, words)
    assert config.train.output_dir == "/x y" and config.a.b == 3
    assert config.dataloader.train.dataset.names == data and config.distill.METHODS == []
    assert python_overrides("x.yaml", opts) == opts
    with pytest.raises(UserError, match=r"SOLVER.GAMMA has no place"):
        python_overrides("x.py", ["SOLVER.GAMMA", 1])


def test_what_is_saved_opens_with_lazyconfig(tmp_path):
    scale = 3
    config = OmegaConf.create(flags={"allow_objects": True})
    config.model = LazyCall(nn.Sequential)(
        norm=lambda channels: nn.BatchNorm2d(channels * scale),  # has no name to be found by
        part=functools.partial(nn.LayerNorm, eps=1e-3),
        text='back\\slash """ and \'quote\'',
        same="${.text}",
    )
    path = tmp_path / "saved.py"
    path.write_text(to_program(config, "# header"))
    loaded = LazyConfig.load(str(path))
    assert loaded.model.norm(2).num_features == 6 and loaded.model.part(4).eps == 1e-3
    assert loaded.model.same == config.model.text
    assert comparable(loaded) == comparable(config)
    loaded.model.norm = lambda channels: nn.BatchNorm2d(channels)
    assert comparable(loaded) != comparable(config)


def test_what_cannot_be_saved_is_one_line():
    config = OmegaConf.create({"x": 1}, flags={"allow_objects": True})
    config.x = (i for i in range(3))
    with pytest.raises(UserError, match="the config holds what cannot be saved: TypeError"):
        to_text(config)


def test_every_head_gets_the_classes_of_the_data():
    model = LazyCall(nn.Module)(
        num_classes=80,
        head=LazyCall(nn.Module)(num_classes="${..num_classes}"),
        predictors=[LazyCall(nn.Module)(num_classes=80)],
        sem_seg_head=LazyCall(nn.Module)(num_classes=54),
    )
    set_num_classes(model, 3)
    assert model.num_classes == model.head.num_classes == model.predictors[0].num_classes == 3
    assert OmegaConf.is_interpolation(model.head, "num_classes")
    assert model.sem_seg_head.num_classes == 54
