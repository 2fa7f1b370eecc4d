"""From configs to teachers, students and distillers."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from toys import STUDENTS, config, detector, distill_config

from d2kd.checkpoint.student_config import modules_needed, student_config
from d2kd.checkpoint.weights import checksum
from d2kd.config import default_config, load_yaml
from d2kd.distillation import TeacherStudent, build_detector, build_model, build_teacher_detector
from d2kd.distillation.build import _problem_of_schedule
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.model_zoo import resolve_config


def test_no_method_is_the_plain_detector():
    model = build_model(config(STUDENTS["FCOS"]))
    assert type(model) is META_ARCH_REGISTRY.get("FCOS")


def test_teacher_student_is_a_registered_architecture(tmp_path):
    cfg = distill_config(tmp_path, "FCOS")
    model = META_ARCH_REGISTRY.get("TeacherStudent")(cfg)
    assert isinstance(model, TeacherStudent)
    assert set(model.distillers) == {"FRS"}


def test_teacher_weights_come_from_its_own_config_when_not_given(tmp_path):
    teacher = detector("shapes/baselines/fcos_tiny_teacher.yaml", seed=5)
    torch.save({"model": teacher.state_dict()}, tmp_path / "model.pth")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
    distill = ["DISTILL.METHODS", ["FRS"], "DISTILL.TEACHER.OPTS", opts]
    distill += ["DISTILL.TEACHER.CONFIG", "shapes/baselines/fcos_tiny_teacher.yaml"]
    model = build_model(config(STUDENTS["FCOS"], distill))
    assert model.teacher.checksum == checksum(teacher)


def teacher_of(name, *opts):
    cfg = config(STUDENTS["FCOS"], ["DISTILL.TEACHER.CONFIG", name, *opts])
    with torch.device("meta"):
        return build_teacher_detector(cfg)


def test_teacher_of_the_model_zoo_brings_its_weights():
    teacher, input_format, weights = teacher_of("COCO-Detection/retinanet_R_101_FPN_3x.yaml")
    assert type(teacher).__name__ == "RetinaNet" and input_format == "BGR"
    assert weights.startswith("https://") and weights.endswith("model_final_971ab9.pkl")


def test_teacher_from_a_python_config():
    opts = ["DISTILL.TEACHER.OPTS", ["model.num_classes=6"]]
    teacher, input_format, weights = teacher_of("COCO-Detection/fcos_R_50_FPN_1x.py", *opts)
    assert teacher.num_classes == 6 and input_format == "BGR"
    assert weights.endswith("R-50.pkl")  # as MODEL.WEIGHTS of a YAML
    teacher, _, _ = teacher_of(
        "COCO-Detection/fcos_R_50_FPN_1x.py", "DISTILL.TEACHER.OPTS", ["model.num_classes", 7]
    )
    assert teacher.num_classes == 7


@pytest.mark.parametrize(
    "text, said",
    [("model = (", "SyntaxError"), ("x = 1", "defines no 'model'"), ("model = dict(a=1)", "model")],
)
def test_a_python_config_that_is_none_is_one_line(tmp_path, text, said):
    (tmp_path / "teacher.py").write_text(text)
    with pytest.raises(UserError, match=rf"teacher.py.*{said}"):
        teacher_of(str(tmp_path / "teacher.py"))


@pytest.mark.parametrize("device", ["gpu", "", "CPU", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(device):
    with pytest.raises(UserError, match="MODEL.DEVICE is"):
        build_detector(config(STUDENTS["FCOS"], ["MODEL.DEVICE", device]))


def test_a_stock_config_is_enough():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    build_detector(cfg)
    cfg = get_cfg()
    load_yaml(cfg, resolve_config(STUDENTS["FCOS"], "test"))
    assert cfg.DISTILL.METHODS == []


def test_teacher_student_is_no_student():
    with pytest.raises(UserError, match="META_ARCHITECTURE is 'TeacherStudent'"):
        build_detector(config(STUDENTS["FCOS"], ["MODEL.META_ARCHITECTURE", "TeacherStudent"]))


def test_values_that_were_set_before_stay():
    cfg = default_config()
    cfg.DISTILL.FRS.FEATURE.WEIGHT = 9.0
    load_yaml(cfg, resolve_config(STUDENTS["FCOS"], "test"))
    assert (cfg.DISTILL.FRS.FEATURE.WEIGHT, cfg.DISTILL.FRS.CLS.WEIGHT) == (9.0, 0.05)


def test_a_term_that_would_never_run_is_refused():
    opts = ["DISTILL.FRS.CLS.START_ITER", 10, "DISTILL.FRS.CLS.STOP_ITER", 10]
    with pytest.raises(UserError, match="CLS.STOP_ITER is 10, but START_ITER is 10"):
        config(STUDENTS["FCOS"], opts)


def test_a_warm_up_that_outlasts_the_run_is_told(tmp_path, caplog):
    opts = ["DISTILL.FRS.CLS.WARMUP_ITERS", 100, "SOLVER.MAX_ITER", 100]
    opts += ["DISTILL.FRS.FEATURE.WARMUP_ITERS", 99]
    build_model(distill_config(tmp_path, "FCOS", opts))
    [said] = [r.getMessage() for r in caplog.records if "WARMUP" in r.getMessage()]
    assert said.startswith("DISTILL.FRS.CLS.WARMUP_ITERS is 100, the run has 100 iterations")


@pytest.mark.parametrize(
    "values, said",
    [
        ({"START_ITER": 100}, "START_ITER is 100, the run has 100 iterations: the term never runs"),
        ({"START_ITER": 99}, ""),
        ({"START_ITER": 95, "WARMUP_ITERS": 5}, "START_ITER is 95, the run has 100 iterations, W"),
        ({"START_ITER": 95, "WARMUP_ITERS": 4}, ""),
        (
            {"STOP_ITER": 10, "WARMUP_ITERS": 10},
            "STOP_ITER is 10, START_ITER is 0, WARMUP_ITERS is",
        ),
        ({"STOP_ITER": 10, "WARMUP_ITERS": 9}, ""),
        ({"STOP_ITER": 500, "WARMUP_ITERS": 100}, "WARMUP_ITERS is 100, the run has 100 iterati"),
        ({"LEVEL_WEIGHTS": [0.0] * 5}, "LEVEL_WEIGHTS are all 0: the term has no effect"),
        ({"LEVEL_WEIGHTS": [0.0, 0.0, 0.0, 0.0, 1.0]}, ""),
    ],
)
def test_a_term_that_never_counts_is_told_by_the_key_that_is_the_cause(values, said):
    node = DISTILLER_REGISTRY.get("CrossKD").default_config().CLS
    node.update(values)
    problem = _problem_of_schedule(node, 100)
    assert problem.startswith(said) and bool(problem) == bool(said)


def test_every_method_documents_a_node_of_its_own():
    cfg = config(STUDENTS["FCOS"])
    for name, method in DISTILLER_REGISTRY:
        assert method.all_terms(), name
        node = method.default_config()
        method.use_defaults_of(node, "FCOS")
        assert cfg.DISTILL[name.upper()] == node
        assert method.__doc__


def test_a_term_that_reads_what_a_detector_lacks_is_refused_before_weights_are_read(tmp_path):
    opts = ["DISTILL.CROSSKD.DEPTH", 3]
    cfg = distill_config(tmp_path, "FCOS", opts, teacher="FasterRCNN", methods=["CrossKD"])
    cfg.DISTILL.TEACHER.WEIGHTS = str(tmp_path / "nowhere.pth")
    with pytest.raises(
        UserError,
        match=r"CROSSKD.CLS.WEIGHT is not 0, .* cls tower at depth 3 of the student "
        r"\(DISTILL.CROSSKD.DEPTH is 3\): the cls tower of FCOS has 2 blocks",
    ):
        build_model(cfg)
    cfg.DISTILL.CROSSKD.DEPTH = 1
    with pytest.raises(UserError, match=r"of the teacher .* of GeneralizedRCNN has 0 blocks"):
        build_model(cfg)


def test_what_detectron2_refuses_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"student's config: RetinaNet cannot be built: .*--debug"):
        build_detector(config(STUDENTS["RetinaNet"], ["MODEL.RESNETS.NORM", "gn"]))
    cfg = distill_config(tmp_path, "RetinaNet")
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.RESNETS.NORM", "gn"]
    with pytest.raises(UserError, match=r"retinanet_tiny.yaml: RetinaNet cannot be built"):
        build_model(cfg)


def test_a_fault_of_d2kd_stays_one(monkeypatch):
    from d2kd.modeling.backbone import basic_resnet

    monkeypatch.setattr(basic_resnet, "BasicStem", None)
    with pytest.raises(TypeError):
        build_detector(config(STUDENTS["RetinaNet"]))


def test_teacher_trained_by_its_recipe_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "shapes/baselines/fcos_tiny_teacher.yaml"
    cfg = config(STUDENTS["FCOS"], ["DISTILL.TEACHER.CONFIG", name])
    assert build_teacher_detector(cfg).weights == "d2kd://fcos_tiny_teacher.pth"  # comes with d2kd
    folder = tmp_path / "output/shapes/baselines/fcos_tiny_teacher"
    folder.mkdir(parents=True)
    (folder / "model_final.pth").touch()
    assert build_teacher_detector(cfg).weights == (
        "output/shapes/baselines/fcos_tiny_teacher/model_final.pth"
    )


def test_keys_of_a_method_that_is_not_listed_are_told(tmp_path, caplog):
    build_model(distill_config(tmp_path, "FCOS", ["DISTILL.PKD.FEATURE.WEIGHT", 3.0]))
    [said] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == (
        "DISTILL.PKD has no effect, DISTILL.METHODS is ['FRS']: add 'PKD', or leave out its keys"
    )


def test_methods_are_listed_once(tmp_path):
    with pytest.raises(UserError, match="names 'FRS' twice"):
        build_model(distill_config(tmp_path, "FCOS", methods=["FRS", "FRS"]))


def test_student_config_has_only_what_differs(tmp_path):
    cfg = distill_config(tmp_path, "RetinaNet", ["SOLVER.OPTIMIZER", "AdamW"])
    student = student_config(cfg)
    assert "DISTILL" not in student and "OPTIMIZER" not in student.SOLVER
    assert "FCOS" not in student.MODEL and "RPN" not in student.MODEL
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    assert modules_needed(cfg) == []
    assert str(tmp_path / "run" / "model_final.pth") == student.MODEL.WEIGHTS


def test_student_config_of_a_class_of_ones_own_keeps_the_node_of_its_base(tmp_path):
    META_ARCH_REGISTRY.register(type("MyATSS", (META_ARCH_REGISTRY.get("ATSS"),), {}))
    opts = ["MODEL.META_ARCHITECTURE", "MyATSS", "MODEL.ATSS.NUM_CLASSES", 7]
    try:
        cfg = distill_config(tmp_path, "ATSS", opts)
        assert student_config(cfg).MODEL.ATSS.NUM_CLASSES == 7
        assert modules_needed(cfg) == ["d2kd.modeling", __name__]
    finally:
        del META_ARCH_REGISTRY._obj_map["MyATSS"]


def test_student_config_of_an_architecture_of_ones_own_keeps_what_it_may_read(tmp_path):
    META_ARCH_REGISTRY.register(type("Mine", (META_ARCH_REGISTRY.get("RetinaNet"),), {}))
    opts = ["MODEL.META_ARCHITECTURE", "Mine", "MODEL.FCOS.NUM_CLASSES", 7]
    try:
        cfg = distill_config(tmp_path, "RetinaNet", opts)
        student = student_config(cfg).MODEL
        assert student.FCOS.NUM_CLASSES == 7 and "ATSS" not in student
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        assert modules_needed(cfg) == [__name__]
    finally:
        del META_ARCH_REGISTRY._obj_map["Mine"]


@pytest.mark.parametrize(
    "device, current", [("cuda", []), ("cuda:1", [torch.device("cuda:1")]), ("cpu:0", [])]
)
def test_a_numbered_gpu_becomes_the_current_one(monkeypatch, device, current):
    found = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, _: self)
    build_detector(config(STUDENTS["FCOS"], ["MODEL.DEVICE", device]), "MODEL")
    assert found == current


def test_what_is_built_beside_the_student_draws_no_random_number_of_the_run(tmp_path):
    """A teacher and MGD's generators."""
    cfg = distill_config(tmp_path, "FCOS", methods=["MGD"])
    states = []
    for build in (build_detector, build_model):
        torch.manual_seed(0)
        build(cfg)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_moving_the_model_moves_the_teacher(tmp_path):
    model = build_model(distill_config(tmp_path, "FCOS")).double()
    assert all(p.dtype == torch.double for p in model.teacher.detector.parameters())


SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def saved_teacher(folder, classes, cfg):
    path = folder / "named.pth"
    model = torch.load(cfg.DISTILL.TEACHER.WEIGHTS, weights_only=True)["model"]
    torch.save({"model": model, "classes": list(classes)}, path)
    cfg.merge_from_list(["DISTILL.TEACHER.WEIGHTS", str(path)])
    return cfg


def test_the_classes_of_a_teacher_are_compared_by_name(tmp_path, toy_dataset, caplog):
    opts = ["DATASETS.TRAIN", toy_dataset[:1]]
    cfg = saved_teacher(tmp_path, SHAPES, distill_config(tmp_path, "FCOS", opts))
    with caplog.at_level("INFO"):
        build_model(cfg)
    assert "verified: classes; unverified: pixels" in caplog.text
    swapped = saved_teacher(tmp_path, SHAPES[::-1], cfg)
    with pytest.raises(UserError, match="class 0 is 'circle' in the data, 'cross' in the file"):
        build_model(swapped)


FEATURES_OF_FRS = ["DISTILL.FRS.CLS.WEIGHT", 0.0]


@pytest.mark.parametrize("method, opts", [("PKD", []), ("FRS", FEATURES_OF_FRS)])
@pytest.mark.parametrize(
    "classes, said",
    [
        (("cat", "dog"), "the data have 6 classes, the file 2"),
        (SHAPES[::-1], "class 0 is 'circle' in the data, 'cross' in the file"),
    ],
)
def test_a_teacher_of_other_classes_teaches_features(
    tmp_path, toy_dataset, caplog, method, opts, classes, said
):
    opts = ["DATASETS.TRAIN", toy_dataset[:1], *opts]
    count = ["MODEL.FCOS.NUM_CLASSES", len(classes)]
    cfg = distill_config(tmp_path, "FCOS", opts, teacher_opts=count, methods=[method])
    with caplog.at_level("INFO"):
        model = build_model(saved_teacher(tmp_path, classes, cfg))
    assert model.teacher.family.num_classes == len(classes)
    assert f"other classes, which no loss compares: {said}" in caplog.text


@pytest.mark.parametrize(
    "student, method, term",
    [
        ("FCOS", "FRS", "CLS"),
        ("FCOS", "CrossKD", "BBOX"),
        ("FCOS", "Mimicking", "CLS"),
        ("FasterRCNN", "GDetKD", "CLS"),
        ("FasterRCNN", "DeFeat", "HEAD_OBJECT"),
    ],
)
def test_what_compares_classes_is_named(tmp_path, toy_dataset, student, method, term):
    key = f"DISTILL.{method.upper()}.{term}.WEIGHT"
    opts = ["DATASETS.TRAIN", toy_dataset[:1], "DISTILL.CROSSKD.DEPTH", 1, key, 1.0]
    cfg = distill_config(tmp_path, student, opts, methods=["PKD", method])
    with pytest.raises(UserError, match=rf"have to be the same for .*{key}.*--finetune-teacher"):
        build_model(saved_teacher(tmp_path, SHAPES[::-1], cfg))


def test_objectness_is_no_class(tmp_path, toy_dataset):
    """FRS compares the scores of two RPNs, which have one class whatever the detectors have."""
    opts = ["DATASETS.TRAIN", toy_dataset[:1]]
    count = ["MODEL.ROI_HEADS.NUM_CLASSES", 2]
    cfg = distill_config(tmp_path, "FasterRCNN", opts, teacher_opts=count, methods=["FRS"])
    model = build_model(saved_teacher(tmp_path, ("cat", "dog"), cfg))
    assert model.distillers["FRS"].terms == {"feature", "cls"}
