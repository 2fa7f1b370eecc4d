"""Stages of ResNets before their last ReLU."""

import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from toys import STUDENTS, batch, detector, step

from d2kd.distillation.teacher import Teacher, TeacherPass
from d2kd.modeling.backbone.timm import TimmBackbone
from d2kd.views import CannotRead, Observed, Recorder, Stage, StudentView, build_family
from d2kd.views.families.residual import residual_sums

NARROW = {"bottleneck_channels": 4}


def resnet(block, blocks_per_stage, norm="BN"):
    """res2 and res3; a single block projects its input where the width changes."""
    torch.manual_seed(0)
    stages, options = [], NARROW if block is BottleneckBlock else {}
    for i, (n, width) in enumerate(zip(blocks_per_stage, (8, 16))):
        shape = {"in_channels": 8, "out_channels": width, "norm": norm, **options}
        strides = [1 + i] + [1] * (n - 1)
        stages.append(ResNet.make_stage(block, n, stride_per_block=strides, **shape))
    stem = BasicStem(out_channels=8, norm=norm)
    return ResNet(stem, stages, out_features=["res2", "res3"])


def observe(net, images):
    """Outputs, and the stages before their last ReLU."""
    sums = residual_sums(net)
    with Recorder([Observed(x) for x in sums.values()]) as recorder:
        outputs = net(images)
    return outputs, {name: recorder.output(x) for name, x in sums.items()}


CASES = pytest.mark.parametrize("blocks", [(1, 1), (2, 3)])


@CASES
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])
def test_a_stage_is_the_relu_of_what_comes_before_it(block, blocks, norm):
    net = resnet(block, blocks, norm)
    outputs, before = observe(net, torch.randn(2, 3, 64, 64))
    assert list(before) == ["res2", "res3"]
    for name, x in before.items():
        assert (x < 0).any() and torch.equal(x.relu(), outputs[name])
        # With the same gradients
        factors, parameters = torch.randn_like(x), [p for p in net.parameters() if p.requires_grad]
        ours, theirs = (
            torch.autograd.grad(
                (y * factors).sum(), parameters, retain_graph=True, allow_unused=True
            )
            for y in (x.relu(), outputs[name])
        )
        for a, b in zip(ours, theirs):
            assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@CASES
def test_observing_changes_nothing(blocks):
    images = torch.randn(2, 3, 64, 64)
    nets = [resnet(BasicBlock, blocks) for _ in range(2)]
    outputs = [nets[0](images), observe(nets[1], images)[0]]
    for maps in outputs:
        sum(x.square().mean() for x in maps.values()).backward()
    for a, b in zip(*(net.parameters() for net in nets)):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(*(net.buffers() for net in nets)):
        assert torch.equal(a, b)
    assert not any(m._forward_hooks for m in nets[1].modules())


def test_only_residual_blocks_are_known():
    assert not residual_sums(TimmBackbone("mobilenetv2_050"))
    net = resnet(BasicBlock, (1, 1))
    net._out_features = ["stem", "res3"]
    assert list(residual_sums(net)) == ["res3"]


@pytest.mark.parametrize("kind", ["RetinaNet", "FasterRCNN"])
def test_views_give_them(kind):
    net, frozen = (detector(STUDENTS[kind], seed=i) for i in range(2))
    frozen.backbone._size_divisibility = 128  # the teacher pads more
    reads = [Stage(name, before) for name in ("res3", "res5") for before in (False, True)]
    family, inputs = build_family(net), batch()
    with Recorder(family.observed(reads)) as recorder:
        step(net, inputs)
    sizes = [(x["height"], x["width"]) for x in inputs]
    student = StudentView(family, reads, recorder, sizes, [x["instances"] for x in inputs])
    formats = {"input_format": "BGR", "student_format": "BGR"}
    teacher_pass = TeacherPass(Teacher(frozen, student=net, **formats), inputs, reads)
    teacher_pass.run_backbone(student.images.tensor)
    teacher = teacher_pass.finish([])
    for view in (student, teacher):
        for name in ("res3", "res5"):
            before = view.stage(Stage(name, pre_activation=True))
            assert before.shape == student.stage(Stage(name)).shape
            assert torch.equal(before.relu(), view.stage(Stage(name)))
            assert before.requires_grad == (view is student)
    assert not any(m._forward_hooks for net in (net, frozen) for m in net.modules())


def test_a_backbone_without_them_says_why():
    timm = ["MODEL.BACKBONE.NAME", "build_timm_fpn_p6p7_backbone", "MODEL.TIMM.PRETRAINED", False]
    net = detector(STUDENTS["RetinaNet"], [*timm, "MODEL.TIMM.NAME", "mobilenetv2_050"])
    family = build_family(net)
    assert family.observe(Stage("res4"))
    message = r"^res4 of RetinaNet \(TimmBackbone\) does not end in a residual block of Detectron2"
    with pytest.raises(CannotRead, match=message):
        family.observe(Stage("res4", pre_activation=True))
