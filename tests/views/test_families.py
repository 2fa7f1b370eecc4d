"""Families from elsewhere: a detector without any dense head, and one that ours would claim."""

import contextlib

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from toys import STUDENTS, batch, detector, step

from d2kd.checkpoint.mmdet_settings import MEAN
from d2kd.checkpoint.verify import detector_settings, verify
from d2kd.distillation import Teacher, TeacherStudent
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.methods.core import TermSchedule
from d2kd.methods.gdetkd.distiller import _student_levels
from d2kd.views import (
    FAMILY_REGISTRY,
    CannotRead,
    Dense,
    Family,
    Features,
    Regions,
    Tower,
    build_family,
)
from d2kd.views.comparable import ANCHOR_SHAPES, check_same
from d2kd.views.families import DenseHead, Pixels
from d2kd.views.families.dense import DenseFamily


@contextlib.contextmanager
def registered(family):
    """The registry with one family more, as long as a test runs."""
    FAMILY_REGISTRY.register(family)
    try:
        yield
    finally:
        del FAMILY_REGISTRY._obj_map[family.__name__]


class ToyBackbone(Backbone):
    """Two stages and two levels of the same strides."""

    def __init__(self, width):
        super().__init__()
        self.bottom_up = ToyStages(width)
        self.lateral = nn.ModuleDict({f"p{i}": nn.Conv2d(width, 8, 1) for i in (3, 4)})

    def forward(self, x):
        stages = self.bottom_up(x)
        return {f"p{i}": self.lateral[f"p{i}"](stages[f"res{i}"]) for i in (3, 4)}

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in (3, 4)}


class ToyStages(Backbone):
    def __init__(self, width):
        super().__init__()
        self.width = width
        self.res3 = nn.Conv2d(3, width, 8, stride=8)
        self.res4 = nn.Conv2d(width, width, 2, stride=2)

    def forward(self, x):
        x = self.res3(x).relu()
        return {"res3": x, "res4": self.res4(x).relu()}

    def output_shape(self):
        return {f"res{i}": ShapeSpec(channels=self.width, stride=2**i) for i in (3, 4)}


class QueryDetector(nn.Module):
    """Queries that attend to the coarsest level, in the manner of DETR; there are no anchors."""

    def __init__(self, width=8, num_classes=6):
        super().__init__()
        self.body = ToyBackbone(width)
        self.queries = nn.Parameter(torch.randn(4, 8))
        self.classes = nn.Linear(8, num_classes + 1)
        self.register_buffer("mean", torch.full((3, 1, 1), 100.0))

    @property
    def device(self):
        return self.mean.device

    def normalise(self, batched_inputs):
        return ImageList.from_tensors([x["image"] - self.mean for x in batched_inputs], 16)

    def forward(self, batched_inputs):
        memory = self.body(self.normalise(batched_inputs).tensor)["p4"].flatten(2)
        found = torch.einsum("qc,ncl->nql", self.queries, memory).softmax(2) @ memory.transpose(
            1, 2
        )
        return {"loss_ce": self.classes(found).logsumexp(2).mean()}


class QueryFamily(Family):
    """All that d2kd has to know to distil its stages and levels."""

    level_names = ["p3", "p4"]
    num_classes = 6

    @classmethod
    def accepts(cls, detector):
        return isinstance(detector, QueryDetector)

    @property
    def backbone(self):
        return self.detector.body

    @property
    def pixels(self):
        return Pixels(tuple(self.detector.mean.flatten().tolist()), (1.0, 1.0, 1.0), 16)

    def preprocess(self, batched_inputs):
        return self.detector.normalise(batched_inputs)


def distilled(student, teacher, method):
    frozen = Teacher(teacher, input_format="BGR", student=student, student_format="BGR")
    cls = DISTILLER_REGISTRY.get(method)
    node = cls.default_config()
    ours, theirs = build_family(student), frozen.family
    reads = cls.reads(node, ours, theirs)
    return TeacherStudent(
        student=student,
        teacher=frozen,
        distillers={method: cls(node, ours, theirs)},
        reads={(method, term): r for term, r in reads.items()},
        schedules={(method, term): TermSchedule(1.0, max_iter=10) for term in reads},
    )


@pytest.mark.parametrize("method", ["HGD", "PKD", "DeFeat"])
def test_a_detector_without_a_dense_head_is_distilled_by_stages_and_levels(method):
    with registered(QueryFamily):
        model = distilled(QueryDetector(), QueryDetector(width=16), method)
        losses = step(model, batch())
        sum(losses.values()).backward()
    assert len(losses) > 1 and all(torch.isfinite(x) for x in losses.values())
    assert all(p.grad is not None for p in model.student.body.bottom_up.parameters())


def test_what_it_lacks_is_refused_with_the_reason():
    with registered(QueryFamily):
        family = build_family(QueryDetector())
        assert family.observe(Features()) == []
        for read in (Dense(), Regions(hidden=True)):
            with pytest.raises(CannotRead, match="QueryDetector"):
                family.observe(read)
        with pytest.raises(UserError, match="neither a box head on an FPN nor anchors"):
            distilled(QueryDetector(), detector(STUDENTS["FasterRCNN"]), "GDetKD")


def test_a_dense_family_without_anchor_shapes_is_told_which_member_lacks():
    family = Family(detector(STUDENTS["FCOS"]))
    family.dense_head = build_family(family.detector).dense_head
    with pytest.raises(UserError, match="^Family does not define anchor_shapes, .* FCOS cannot"):
        check_same(family, family, (ANCHOR_SHAPES,), "DISTILL.FRS.CLS.WEIGHT")


def test_classes_are_counted_under_detectron2s_names():
    counted, heads = nn.Module(), nn.Module()
    counted.num_classes, heads.roi_heads = 7, nn.Module()
    heads.roi_heads.num_classes = 8
    found = [Family(x).num_classes for x in (counted, heads, nn.Module())]
    assert found == [7, 8, None]


def test_its_weights_are_verified_by_what_its_family_says():
    model = QueryDetector()
    with registered(QueryFamily):
        found = detector_settings(model, "BGR", ["a", "b"])
        text = verify({"CLASSES": ["a", "b"]}, model, "w.pth", "BGR", ["a", "b"])
    assert found[MEAN] == [100.0] * 3 and text == "verified: classes; unverified: pixels"


class TowerlessFamily(DenseFamily):
    """A dense head that cannot be taken apart."""

    def __init__(self, detector):
        super().__init__(detector)
        head = self.dense_head
        self.dense_head = DenseHead(head.module, head.num_anchors, head.num_classes, None)

    @classmethod
    def accepts(cls, detector):
        return isinstance(detector, RetinaNet)


def test_regions_of_a_head_without_towers_are_contrasted_by_its_levels():
    with registered(TowerlessFamily):
        student = build_family(detector(STUDENTS["RetinaNet"]))
        teacher = build_family(detector(STUDENTS["FasterRCNN"]))
        method = DISTILLER_REGISTRY.get("GDetKD")
        node = method.default_config()
        node.CLS.WEIGHT = node.BBOX.WEIGHT = 0.0
        read = method.reads(node, student, teacher)["ckd"].student
        distiller = method(node, student, teacher)
    assert [x.depth for x in read if isinstance(x, Tower)] == [0]
    assert distiller.contrast.adapter.in_features == student.levels[0].channels


def test_levels_of_several_widths_have_no_adapter_in_common():
    student, teacher = (build_family(detector(STUDENTS[x])) for x in ("RetinaNet", "FasterRCNN"))
    student.levels[0] = student.levels[0]._replace(channels=5)
    node = DISTILLER_REGISTRY.get("GDetKD").default_config()
    with pytest.raises(UserError, match=r"GDETKD.LEVELS: .* have \[5, .* of one width"):
        _student_levels(node, student)


class FixedProposals(nn.Module):
    """A foreign proposal generator: the whole image, always."""

    def forward(self, images, features, gt_instances=None):
        proposals = []
        for height, width in images.image_sizes:
            boxes = Boxes(torch.tensor([[0.0, 0.0, width, height]]))
            logits = torch.zeros(1)
            proposals.append(
                Instances((height, width), proposal_boxes=boxes, objectness_logits=logits)
            )
        return proposals, {}


class FixedProposalsFamily(Family):
    num_classes = 6
    level_names = ["p2", "p3", "p4", "p5", "p6"]

    @classmethod
    def accepts(cls, detector):
        return isinstance(detector, GeneralizedRCNN) and isinstance(
            detector.proposal_generator, FixedProposals
        )


def foreign_rcnn(seed):
    net = detector(STUDENTS["FasterRCNN"], seed=seed)
    net.proposal_generator = FixedProposals()
    return net


def test_a_two_stage_detector_with_foreign_proposals_joins_by_its_own_family():
    with registered(FixedProposalsFamily):
        model = distilled(foreign_rcnn(0), foreign_rcnn(1), "PKD")
        assert type(model.family) is FixedProposalsFamily
        sum(step(model, batch()).values()).backward()
        # Ours still serves ours.
        assert type(build_family(detector(STUDENTS["FasterRCNN"]))).__name__ == "TwoStageFamily"


def test_without_a_family_of_its_own_it_is_refused_and_not_misread():
    with pytest.raises(UserError, match="GeneralizedRCNN.*DenseFamily, TwoStageFamily"):
        build_family(foreign_rcnn(0))


def test_the_family_registered_last_comes_first():
    class Other(FixedProposalsFamily):
        @classmethod
        def accepts(cls, detector):
            return isinstance(detector, GeneralizedRCNN)

    with registered(Other):
        assert type(build_family(detector(STUDENTS["FasterRCNN"]))) is Other


def test_unknown_architecture_names_the_registry():
    with pytest.raises(UserError, match="Linear.*FAMILY_REGISTRY"):
        build_family(torch.nn.Linear(1, 1))
