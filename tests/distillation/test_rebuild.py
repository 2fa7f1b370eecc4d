"""The teacher rebuilt for speed: what is folded, what is not, and the proof of equal outputs."""

import contextlib
import copy
import logging
import shutil
from collections import Counter

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from toys import AS_LOADED, STUDENTS, batch, detector, distill_config, step

from d2kd.check.noise import try_on_noise
from d2kd.checkpoint import checksum
from d2kd.config import read_config
from d2kd.distillation import build_model, build_teacher_detector, save_random_teacher
from d2kd.distillation.rebuild import (
    Options,
    declared_outputs,
    fold_frozen_norms,
    largest_unobserved,
    rebuild,
)
from d2kd.errors import UserError
from d2kd.views import build_family
from d2kd.views.reads import Stage

PAIRS = [(student, method) for student in STUDENTS for method in ("FRS", "DeFeat", "HGD")]
PAIRS += [("RetinaNet", "CrossKD"), ("GFL", "CrossKD"), ("FasterRCNN", "GDetKD")]


def filled(module, seed=0):
    """Norms with statistics and weights that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if getattr(norm, "running_var", None) is not None:
            for tensor in (norm.weight, norm.running_var):
                tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (norm.bias, norm.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return module.eval().requires_grad_(False)


def conv(norm, **kwargs):
    return Conv2d(4, 6, 3, padding=1, norm=norm, **kwargs)


@pytest.mark.parametrize(
    "net, count",
    [
        (nn.Sequential(conv(FrozenBatchNorm2d(6), bias=False)), 1),
        (nn.Sequential(conv(nn.BatchNorm2d(6), activation=torch.relu)), 1),
        (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()), 1),
        (nn.Sequential(conv(None), nn.BatchNorm2d(6, affine=True)), 1),
        (nn.Sequential(conv(nn.BatchNorm2d(6)), nn.BatchNorm2d(6)), 1),  # one norm per layer
        (nn.Sequential(conv(None, activation=torch.relu), nn.BatchNorm2d(6)), 0),
        (nn.Sequential(conv(nn.GroupNorm(2, 6))), 0),
        (nn.Sequential(conv(nn.BatchNorm2d(6, track_running_stats=False))), 0),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)), 0),  # the other order
    ],
)
def test_what_is_folded(net, count):
    x = torch.randn(2, 4, 5, 7)
    before = filled(net)(x)
    assert fold_frozen_norms(net) == count
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_linear_layers_are_folded_too():
    net = filled(nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)))
    x = torch.randn(5, 4)
    before = net(x)
    assert fold_frozen_norms(net) == 1 and isinstance(net[1], nn.Identity)
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_norm_per_level_is_left_alone():
    shared = nn.Conv2d(4, 6, 1)
    levels = nn.ModuleList(nn.Sequential(shared, nn.BatchNorm2d(6)) for _ in range(2))
    assert fold_frozen_norms(filled(levels)) == 0


def test_what_is_observed_is_left_alone():
    norm, first = nn.BatchNorm2d(6), nn.Conv2d(4, 6, 1)
    net = filled(nn.Sequential(conv(norm), nn.Conv2d(6, 4, 1), first, nn.BatchNorm2d(6)))
    assert fold_frozen_norms(copy.deepcopy(net)) == 2
    assert fold_frozen_norms(net, [norm, first]) == 0


@pytest.mark.parametrize("student, method", PAIRS, ids=lambda x: x)
def test_losses_and_gradients_are_those_of_the_file(tmp_path, student, method):
    norms = ["MODEL.RESNETS.NORM", "FrozenBN"]
    depth = ["DISTILL.CROSSKD.DEPTH", 1]
    steps, torch_state = [], torch.get_rng_state()
    for opts in ([*AS_LOADED, *depth], depth):
        cfg = distill_config(tmp_path, student, opts, teacher_opts=norms, methods=[method])
        torch.set_rng_state(torch_state)
        model = build_model(cfg)
        losses = step(model, batch())
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        steps.append((losses, gradients))
    for before, after in zip(*steps):
        assert before.keys() == after.keys()
        for name in before:
            scale = before[name].abs().max().item()
            torch.testing.assert_close(
                after[name], before[name], rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=name
            )


def test_the_report_says_what_was_done(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    norms = ["MODEL.RESNETS.NORM", "FrozenBN"]
    model = build_model(distill_config(tmp_path, "FCOS", teacher_opts=norms))
    assert "The teacher runs rebuilt: " in caplog.text and "norms folded, channels last" in (
        caplog.text
    )
    conv1 = model.teacher.detector.backbone.bottom_up.res3[0].conv1
    assert conv1.norm is None and conv1.bias is not None
    assert model.teacher.detector.head.cls_score.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    assert model.teacher.checksum != checksum(model.teacher.detector)
    caplog.clear()
    model = build_model(distill_config(tmp_path, "FCOS", AS_LOADED, teacher_opts=norms))
    assert "rebuilt" not in caplog.text
    assert model.teacher.checksum == checksum(model.teacher.detector)


def test_a_wrong_rebuild_is_refused(tmp_path, monkeypatch):
    def folded_wrongly(detector, observed):
        detector.backbone.fpn_output3.weight.data *= 1.01
        return 1

    monkeypatch.setattr("d2kd.distillation.rebuild.fold_frozen_norms", folded_wrongly)
    with pytest.raises(UserError, match="its features differ by 0.0.* set FOLD_NORMS"):
        build_model(distill_config(tmp_path, "FCOS"))


@pytest.fixture
def rounding():
    """Lets products of matrices round to TF32, in the way that this torch has; returns how those
    and convolutions do."""
    new = hasattr(torch.backends, "fp32_precision")
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv if new else torch.backends.cudnn)
    name, rounded = ("fp32_precision", "tf32") if new else ("allow_tf32", True)
    before = getattr(parts[0], name)
    setattr(parts[0], name, rounded)
    yield lambda: [getattr(part, name) for part in parts]
    setattr(parts[0], name, before)


def test_float32_is_compared_in_all_of_its_bits(tmp_path, monkeypatch, rounding):
    """As NVIDIA rounds by default, a deep teacher whose norms are folded differs by more than a
    mistake would."""
    before, seen = rounding(), []

    def observed(*args):
        seen.extend(rounding())
        return declared_outputs(*args)

    monkeypatch.setattr("d2kd.distillation.rebuild.declared_outputs", observed)
    build_model(distill_config(tmp_path, "FCOS"))
    assert len(seen) == 4 and set(seen) <= {False, "ieee"}
    assert rounding() == before and before[0] in (True, "tf32")


@pytest.mark.parametrize("noise, refused", [(0.1, False), (1.0, True), (float("inf"), True)])
def test_half_precision_goes_by_the_norm_of_all_differences(tmp_path, monkeypatch, noise, refused):
    calls = []

    def noisy(*args):
        calls.append(args)
        outputs = declared_outputs(*args)
        if len(calls) == 1:
            return outputs
        return {
            read: [x.float() + noise * x.float().std() * torch.randn(x.shape) for x in tensors]
            for read, tensors in outputs.items()
        }

    monkeypatch.setattr("d2kd.distillation.rebuild.declared_outputs", noisy)
    opts = [*AS_LOADED, "DISTILL.TEACHER.PRECISION", "float16"]
    with pytest.raises(UserError, match="differ by") if refused else contextlib.nullcontext():
        build_model(distill_config(tmp_path, "FCOS", opts))
    assert len(calls) == 2


def test_half_precision_is_compared_too(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    opts = ["DISTILL.TEACHER.PRECISION", "bfloat16"]
    model = build_model(distill_config(tmp_path, "FCOS", opts))
    assert model.teacher.precision_name == "bfloat16"
    assert (
        "The teacher runs rebuilt: " in caplog.text and ", bfloat16; outputs as of" in caplog.text
    )
    assert ", in bfloat16 to " in caplog.text


def test_float32_whatever_the_student_runs_in(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    opts = [*AS_LOADED, "DISTILL.TEACHER.PRECISION", "float32"]
    build_model(distill_config(tmp_path, "FCOS", opts))
    assert "The teacher runs rebuilt: float32; outputs as of the file in float32 to 0e+00" in (
        caplog.text
    )


def test_a_deep_random_teacher_stays_in_the_range_of_float16(tmp_path):
    """It stands for a trained one in checks, estimates and benchmarks, in mixed precision too."""
    cfg = read_config("frs/retinanet_R_50_R_101-2x_2x", ["MODEL.DEVICE", "cpu"])
    save_random_teacher(cfg, str(tmp_path / "teacher.pth"))
    teacher = build_teacher_detector(cfg).detector.eval()
    teacher.load_state_dict(torch.load(tmp_path / "teacher.pth", weights_only=True)["model"])
    with torch.no_grad():
        levels = teacher.backbone.bottom_up(60 * torch.randn(1, 3, 64, 64))
    assert max(level.abs().max() for level in levels.values()) < torch.finfo(torch.float16).max / 10


def test_mixed_precision_of_the_student_is_tried_on_the_teacher(tmp_path):
    """Before the first step, which a teacher that overflows in float16 would spoil."""
    model = build_model(distill_config(tmp_path, "FCOS"))
    reads = {read for asked in model.reads.values() for read in asked.teacher}
    mixed = Options(mixed=True)
    assert ", in float16 to " in rebuild(model.teacher, model.family, reads, mixed)
    model.teacher.detector.backbone.fpn_lateral3.weight.data *= 1e6
    with pytest.raises(UserError, match="in half precision.* differ by nan.* set PRECISION"):
        rebuild(model.teacher, model.family, reads, mixed)


def test_an_output_of_zeros_is_equal_to_itself(tmp_path):
    model = build_model(distill_config(tmp_path, "FCOS"))
    for parameter in model.teacher.detector.backbone.fpn_output3.parameters():
        parameter.data.zero_()
    reads = {read for asked in model.reads.values() for read in asked.teacher}
    done = rebuild(model.teacher, model.family, reads, Options(mixed=True))
    assert "outputs as of the file to 0e+00, in float16 to " in done


def test_gradients_through_a_teacher_in_half_precision_survive(tmp_path):
    """A small loss has a small gradient, which is as exact: none of it passes through float16."""
    opts = ["DISTILL.TEACHER.PRECISION", "float16", "DISTILL.CROSSKD.DEPTH", 1]
    model = build_model(distill_config(tmp_path, "GFL", opts, methods=["CrossKD"]))
    loss = step(model, batch())["loss_crosskd_cls"]
    large, small = (
        torch.autograd.grad(
            loss * scale, model.student.head.cls_subnet[0].weight, retain_graph=True
        )
        for scale in (1.0, 2.0**-14)
    )
    assert torch.allclose(small[0] * 2**14, large[0], rtol=1e-4, atol=large[0].abs().max() * 1e-5)


def test_images_of_one_channel(tmp_path):
    gray = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [50.0]]
    cfg = distill_config(tmp_path, "FCOS", gray, teacher_opts=gray)
    model = build_model(cfg)
    inputs = [{**x, "image": x["image"][:1]} for x in batch()]
    assert all(loss.isfinite() for loss in step(model, inputs).values())
    try_on_noise(cfg, model)


def test_no_random_number_is_drawn(tmp_path):
    """The student's own numbers do not depend on how its teacher runs."""
    states = []
    for opts in (AS_LOADED, []):
        cfg = distill_config(tmp_path, "FasterRCNN", opts, methods=["DeFeat"])
        torch.manual_seed(4)
        model = build_model(cfg)
        streams = [s.state_dict() for s in model.random_streams().values()]
        states.append((torch.get_rng_state(), checksum(model.student), str(streams)))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1:] == states[1][1:]


def test_parts_to_compile_have_no_hooks_inside():
    family = build_family(detector(STUDENTS["RetinaNet"], ["MODEL.RESNETS.NORM", "FrozenBN"]))
    bottom_up = family.stage_module
    assert list(largest_unobserved(family.backbone, [family.backbone])) == [family.backbone]
    inside = set(largest_unobserved(family.backbone, [bottom_up]))
    assert bottom_up in inside and family.backbone not in inside
    sums = [o.module for o in family.observe(Stage("res5", pre_activation=True))]
    parts = list(largest_unobserved(family.backbone, sums))
    hooked = {m for s in sums for m in s.hooked}
    assert all(hooked.isdisjoint(set(part.modules()) - {part}) for part in parts)
    assert bottom_up.res4 in parts and bottom_up.res5 not in parts


@pytest.mark.docs
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    losses = []
    for opts in ([], ["DISTILL.TEACHER.COMPILE", True]):
        torch.manual_seed(0)
        model = build_model(distill_config(tmp_path, "FCOS", opts))
        losses.append([step(model, batch(sizes=s)) for s in (((96, 128),), ((64, 80), (96, 64)))])
    assert "compiled; " in caplog.text
    for before, after in zip(*losses):
        assert all(torch.allclose(after[k], v, rtol=1e-4) for k, v in before.items())


@pytest.mark.parametrize("name", ["RetinaNet", "FasterRCNN"])
def test_what_is_compiled_is_what_runs(tmp_path, monkeypatch, name):
    """FRS reads one branch of a RetinaNet's head, and all of an RPN."""
    calls = Counter()

    def compiled(function, **_):
        def call(*args):
            calls[function.__self__] += 1
            return function(*args)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    opts = ["DISTILL.TEACHER.COMPILE", True]
    model = build_model(distill_config(tmp_path, name, opts, methods=["FRS"]))
    calls.clear()
    step(model, batch())
    head, levels = model.teacher.family.dense_head, len(model.family.levels)
    part = head.tower("cls") if name == "RetinaNet" else head.module
    assert calls == {model.teacher.family.backbone: 1, part: levels if name == "RetinaNet" else 1}


def test_what_cannot_be_compiled_runs_without(tmp_path, caplog, monkeypatch):
    def no_compiler(function, **_):
        def fail(*args):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = build_model(distill_config(tmp_path, "FCOS", ["DISTILL.TEACHER.COMPILE", True]))
    assert "which runs without: RuntimeError: no compiler here" in caplog.text
    assert torch.isfinite(step(model, batch())["loss_frs_feature"])
