"""HGD (our reading of the abstract): what the distiller makes of made-up maps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from d2kd.layers import valid_cells
from d2kd.methods.hgd import HGD, stage_weights
from d2kd.methods.hgd.distances import DISTANCES, squared_scale
from d2kd.methods.hgd.pairs import StagePair, resize
from d2kd.methods.hgd.weights import micro_weights
from d2kd.views import Level, Stage


class MadeUpView:
    """Holds maps by stage, and by FPN level."""

    def __init__(self, stages, image_sizes=()):
        self.stages = stages
        self.features = {}
        self.images = SimpleNamespace(image_sizes=list(image_sizes))

    def stage(self, read):
        assert not read.pre_activation
        return self.stages[read.name]

    def image(self, n):
        """The same of one image."""
        maps = {name: x[n : n + 1] for name, x in self.stages.items()}
        return MadeUpView(maps, self.images.image_sizes[n : n + 1])


# Arguments of HGD that are called as their keys
OPTIONS = ("PRE_ACTIVATION", "NORM", "DISTANCE", "SPATIAL_POWER", "CHANNEL_POWER", "GAP_POWER")
OPTIONS += ("FOREGROUND", "MAX_WEIGHT", "MACRO", "MACRO_POWER")
PAIRS = [
    StagePair("stages", Level("res2", 4, 3), (Level("res2", 4, 3),)),
    StagePair("stages", Level("res3", 8, 4), (Level("res3", 8, 6),)),
]
FITNETS = {"norm": "none", "spatial_power": 0, "channel_power": 0, "macro_power": 0}


def views(seed=0, sizes=((16, 24), (11, 24)), factor=1.0):
    generator = torch.Generator().manual_seed(seed)

    def maps(widths, scale):
        return {
            name: scale * torch.randn(2, c, 16 // s, 24 // s, generator=generator)
            for (name, s), c in zip((("res2", 4), ("res3", 8)), widths)
        }

    return MadeUpView(maps((3, 4), 1.0), sizes), MadeUpView(maps((3, 6), factor))


def distiller(pairs=PAIRS, **options):
    torch.manual_seed(0)
    defaults = {key.lower(): HGD.keys[key].default for key in OPTIONS}
    options = {"terms": ("feature",), "learned_shares": False, **defaults, **options}
    return HGD(pairs=pairs, **options)


def mean_square(error, student, stride):
    """Of the images of a batch, without their padding."""
    valid = valid_cells(student.images.image_sizes, error.shape[-2:], stride, "cpu")
    return torch.stack([error[n][:, valid[n]].square().mean() for n in range(2)]).mean()


def test_without_weights_and_norm_it_is_fitnets():
    model = distiller(**FITNETS)
    student, teacher = views()
    losses = model(student, teacher, None)["feature"]
    for k, name in enumerate(("res2", "res3")):
        error = model.adapters[k](student.stages[name]) - teacher.stages[name]
        plain = mean_square(error, student, 4 * 2**k) / 2
        assert torch.allclose(losses[k], plain, rtol=1e-5)


def test_identical_networks_have_no_loss():
    pairs = [StagePair("stages", Level("res2", 4, 3), (Level("res2", 4, 3),))]
    student, _ = views()
    for options in ({}, {"macro_power": -1}, {"gap_power": 1}, {"norm": "channel_std"}):
        assert distiller(pairs, **options)(student, student, None)["feature"].sum() == 0


def test_first_step_is_weighted_with_its_own_gaps():
    student, teacher = views()
    uniform = distiller(macro_power=0)(student, teacher, None)["feature"] * 2
    model = distiller(macro_power=1)
    losses = model(student, teacher, None)["feature"]
    assert torch.allclose(model.gaps, uniform.detach(), rtol=1e-5)
    assert torch.allclose(losses, stage_weights(uniform, 1) * uniform / 2, rtol=1e-5)


def test_statistics_run_and_are_saved():
    model = distiller()
    energies, gaps = [], []
    for seed in range(3):
        student, teacher = views(seed, factor=1 + seed)
        valid = [
            valid_cells(student.images.image_sizes, (16 // s, 24 // s), s, "cpu") for s in (4, 8)
        ]
        batch = [squared_scale(t, v) for t, v in zip(teacher.stages.values(), valid)]
        energies.append(torch.cat(batch))
        before = model.state_dict()["gaps"].clone()
        model(student, teacher, None)
        gaps.append((before, model.gaps.clone()))
    expected = energies[0]
    for energy in energies[1:]:
        expected = 0.99 * expected + 0.01 * energy
    assert torch.allclose(model.scales, expected, rtol=1e-6)
    assert gaps[0][0].isnan().all() and (gaps[2][1] / gaps[2][0]).sub(1).abs().max() < 0.1

    resumed = distiller()
    resumed.load_state_dict(model.state_dict())
    inputs = views(9)
    assert torch.equal(resumed(*inputs, None)["feature"], model(*inputs, None)["feature"])
    assert not torch.equal(distiller()(*inputs, None)["feature"], model(*inputs, None)["feature"])


@pytest.mark.parametrize("macro", ["gap", "per_image", "uncertainty"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", ["energy", "channel_std", "none"])
def test_every_choice_trains_every_parameter(macro, distance, norm):
    model = distiller(macro=macro, distance=distance, norm=norm, gap_power=1.0)
    losses = model(*views(), None)["feature"]
    losses.sum().backward()
    assert losses.shape == (2,) and torch.isfinite(losses).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_weights_per_image():
    student, teacher = views()
    plain = distiller(macro_power=0)
    each = []
    for n in range(2):
        plain.scales.copy_(torch.ones(2)), plain.gaps.copy_(torch.ones(2))
        plain.norm = "none"
        each.append(plain(student.image(n), teacher.image(n), None)["feature"].sum())
    each = torch.stack(each)
    model = distiller(macro="per_image", norm="none")
    expected = (stage_weights(each, 1) * each).mean()
    assert model(student, teacher, None)["feature"].sum().item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_objects_count_more():
    pairs = PAIRS[:1]
    student, teacher = views(sizes=((16, 24), (16, 24)))
    boxes = [torch.tensor([[4.0, 4.0, 12.0, 12.0]]), torch.zeros(0, 4)]
    targets = [SimpleNamespace(gt_boxes=SimpleNamespace(tensor=b)) for b in boxes]
    options = {"norm": "none", "spatial_power": 0, "channel_power": 0}
    model = distiller(pairs, foreground=4.0, **options)
    error = (model.adapters[0](student.stages["res2"]) - teacher.stages["res2"]) ** 2
    weight = torch.ones(2, 1, 4, 6)
    weight[0, :, 1:3, 1:3] = 5.0
    expected = (error * weight / weight.mean((1, 2, 3), keepdim=True)).mean()
    assert torch.allclose(model(student, teacher, targets)["feature"][0], expected, rtol=1e-5)


def test_gap_weights_follow_the_error():
    student, teacher = views(sizes=((16, 24), (16, 24)))
    model = distiller(PAIRS[:1], norm="none", spatial_power=0, channel_power=0, gap_power=1.0)
    error = (model.adapters[0](student.stages["res2"]) - teacher.stages["res2"]) ** 2
    gap = error.mean(1, keepdim=True)
    gap = gap / gap.mean((2, 3), keepdim=True)
    expected = (error * gap.detach()).mean()
    assert torch.allclose(model(student, teacher, None)["feature"][0], expected, rtol=1e-5)


@pytest.mark.parametrize("stride, size", [(4, (8, 12)), (16, (2, 3))])
def test_maps_of_other_resolution(stride, size):
    """The teacher's map is averaged to the student's, or the student's brought to the teacher's."""
    pair = StagePair("stages", Level("res3", 8, 4), (Level("res3", stride, 6),))
    student, _ = views(sizes=((32, 48), (16, 24)))
    student.stages["res3"] = torch.randn(2, 4, 4, 6, requires_grad=True)
    teacher = MadeUpView({"res3": torch.randn(2, 6, *size)})
    model = distiller([pair], **FITNETS)
    loss = model(student, teacher, None)["feature"][0]
    adapted, target = model.adapters[0](student.stages["res3"]), teacher.stages["res3"]
    if stride == 4:
        target = torch.nn.functional.avg_pool2d(target, 2)
    else:
        adapted = torch.nn.functional.avg_pool2d(adapted, 2)  # as bilinear does at a factor of 2
    expected = mean_square(adapted - target, student, max(stride, 8))
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    assert student.stages["res3"].grad.abs().sum() > 0


def test_learned_correspondence_finds_the_stage():
    """The teacher's two levels are random; the student is the second of them."""
    levels = (Level("p2", 4, 3), Level("p3", 8, 3))
    student, teacher = views(sizes=((16, 24), (16, 24)))
    teacher.features = {"p2": torch.randn(2, 3, 4, 6), "p3": torch.randn(2, 3, 2, 3)}
    student.features = {"p3": teacher.features["p3"]}
    pairs = [StagePair("features", levels[1], levels)]
    model = distiller(pairs, learned_shares=True, **FITNETS)
    optimizer = torch.optim.SGD(model.mixing.parameters(), lr=5.0)
    for _ in range(40):
        optimizer.zero_grad()
        model(student, teacher, None)["feature"].sum().backward()
        optimizer.step()
    assert model.mixing[0].softmax(0)[1] > 0.9


def test_a_mix_is_compared_on_the_cells_of_the_student():
    levels = (Level("p2", 4, 3), Level("p3", 8, 3))
    student, teacher = views(sizes=((32, 48), (16, 24)))
    torch.manual_seed(0)
    teacher.features = {"p2": torch.randn(2, 3, 8, 12), "p3": torch.randn(2, 3, 4, 6)}
    student.features = {"p3": torch.randn(2, 3, 4, 6)}
    model = distiller([StagePair("features", levels[1], levels)], learned_shares=True, **FITNETS)
    target = (resize(teacher.features["p2"], (4, 6)) + teacher.features["p3"]) / 2
    error = model.adapters[0](student.features["p3"]) - target
    loss = model(student, teacher, None)["feature"][0]
    assert torch.allclose(loss, mean_square(error, student, 8), rtol=1e-5)


@pytest.mark.parametrize("stride, size", [(4, (8, 12)), (16, (2, 3))])
def test_unpaired_stages_are_averaged_into_a_pair(stride, size):
    """At the size of the pair's own teacher stage."""
    pair = StagePair("features", Level("p3", 8, 4), (Level("p3", 8, 6), Level("px", stride, 6)))
    student, teacher = views(sizes=((32, 48), (32, 48)))
    student.features = {"p3": torch.randn(2, 4, 4, 6)}
    teacher.features = {"p3": torch.randn(2, 6, 4, 6), "px": torch.randn(2, 6, *size)}
    other = resize(teacher.features["px"], (4, 6))
    target = (teacher.features["p3"] + other) / 2
    model = distiller([pair], **FITNETS)
    expected = (model.adapters[0](student.features["p3"]) - target).square().mean()
    assert torch.allclose(model(student, teacher, None)["feature"][0], expected, rtol=1e-5)
    assert not model.mixing


def test_stages_before_their_activation_are_read_there():
    student, teacher = views()
    model = distiller(pre_activation=True, **FITNETS)
    asked = []
    for view in (student, teacher):
        view.stage = lambda read, view=view: asked.append(read) or view.stages[read.name] - 0.5
    losses = model(student, teacher, None)["feature"]
    expected = [Stage(name, pre_activation=True) for name in ("res2", "res3")]
    assert asked == [read for read in expected for _ in (student, teacher)]
    shifted = [MadeUpView({k: x - 0.5 for k, x in v.stages.items()}) for v in (student, teacher)]
    shifted[0].images = student.images
    assert torch.equal(losses, distiller(**FITNETS)(*shifted, None)["feature"])


@pytest.mark.parametrize("macro", ["gap", "per_image", "uncertainty"])
def test_diagnostics_by_hand(macro):
    student, teacher = views()
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 16.0]]), torch.zeros(0, 4)]
    targets = [SimpleNamespace(gt_boxes=SimpleNamespace(tensor=b)) for b in boxes]
    model = distiller(foreground=4.0, max_weight=3.0, macro=macro)
    variances = torch.zeros(2)
    if macro == "uncertainty":
        variances = model.log_variances.data.copy_(torch.tensor([1.0, -1.0]))
    terms = model(student, teacher, targets)
    losses = terms["feature"].detach()
    logged = {name: value.item() for name, value in terms.diagnostics["feature"]().items()}
    assert len(logged) == 8
    for k, (name, stride) in enumerate((("res2", 4), ("res3", 8))):
        numbers = [logged[f"{name}/{x}"] for x in ("loss", "macro", "max_micro", "on_objects")]
        assert numbers[0] * numbers[1] / 2 == pytest.approx((losses - variances / 2)[k].item())
        if macro == "gap":
            assert numbers[1] == pytest.approx(stage_weights(model.gaps, 1)[k].item())
        if macro == "uncertainty":
            assert numbers[1] == pytest.approx(np.exp(-variances[k].item()))
        target = teacher.stages[name]
        valid = valid_cells(student.images.image_sizes, target.shape[-2:], stride, "cpu")
        position, channel = micro_weights(target, valid, 1, 1)
        position[0, :, : 8 // stride] *= 5
        weights = (position[:, None] * channel[..., None, None]).clamp(max=3)
        for n in range(2):
            weights[n] /= weights[n][:, valid[n]].mean()
        assert numbers[2] == pytest.approx(weights.max().item())
        share = weights[0, :, :, : 8 // stride].sum() / weights.sum()
        assert numbers[3] == pytest.approx(share.item()) and 0.1 < share < 0.9


def test_backward_keeps_no_map_of_weights_or_errors():
    kept = []
    model = distiller()
    student, teacher = views()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(student, teacher, None)
    maps = {x.data_ptr() for x in kept if x.dim() == 4 and x.shape[-1] > 1}
    assert len(maps) == 3 * len(PAIRS)  # student, adapted student and teacher, which exist anyway


def test_nothing_waits_for_the_device():
    """Tensors on the meta device have no values, so anything that waits for them would fail."""
    student, teacher = views()
    for view in (student, teacher):
        view.stages = {k: x.to("meta") for k, x in view.stages.items()}
    boxes = SimpleNamespace(gt_boxes=SimpleNamespace(tensor=torch.zeros(2, 4, device="meta")))
    model = distiller(gap_power=1.0, foreground=1.0).to("meta")
    model(student, teacher, [boxes, boxes])["feature"].sum().backward()


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    reductions, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: reductions.append(1) or reduce(*args, **kwargs)
    model = distiller()
    for step in range(3):
        model(*views(2 * step + rank), None)
    torch.save((model.state_dict(), len(reductions)), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_processes_share_their_statistics_in_one_reduction_per_step(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    (ours, count), (theirs, _) = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert count == 3 and all(torch.equal(ours[k], theirs[k]) for k in ours)
    alone = distiller()
    alone(*views(0), None)
    assert not torch.equal(ours["scales"], alone.scales)
