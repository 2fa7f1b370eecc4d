"""HGD (our reading of the abstract): the formulas by value and gradient, and their invariants."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils.events import EventStorage

from d2kd.methods.distances import DISTANCES, squared_scale
from d2kd.methods.grids import resize, valid_cells
from d2kd.methods.hgd import HGD, element_weights, micro_weights, stage_weights, weighted_distance
from d2kd.modeling.families import Level, StagePair

TEACHER = torch.tensor([[3.0, 1, 0], [1, 0, 1]]).reshape(1, 2, 1, 3)
STUDENT = torch.tensor([[2.0, 1, 1], [0, 0, 1]]).reshape(1, 2, 1, 3)
EVERYWHERE = torch.ones(1, 1, 3, dtype=torch.bool)


@pytest.fixture(autouse=True)
def storage():
    """Where losses are computed in training."""
    with EventStorage():
        yield


def stage_loss(
    student, teacher, valid, powers=(1, 1), max_weight=10.0, distance="l2", norm="energy"
):
    """One stage on its own, as in the first step."""
    position, channel = micro_weights(teacher, valid, *powers)
    scale = squared_scale(teacher, valid, norm)
    values = weighted_distance(student, teacher, position, channel, scale, distance, max_weight)
    return (values / DISTANCES[distance].divisor(scale)).mean()


def padded(x, rows, columns, value=7.0):
    return torch.nn.functional.pad(x, (0, columns, 0, rows), value=value)


def random_case(seed=0):
    """Two images of different size on a map of 6 x 8 with 5 channels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 5, 6, 8, generator=generator) * 3
    valid = valid_cells([(48, 64), (35, 21)], (6, 8), 8, "cpu")
    return student, teacher, valid


@pytest.mark.parametrize(
    "powers, expected", [((0, 0), 0.25), ((1, 0), 0.375), ((0, 1), 5 / 18), ((1, 1), 7 / 18)]
)
def test_micro_weights_of_the_hand_computed_case(powers, expected):
    assert stage_loss(STUDENT, TEACHER, EVERYWHERE, powers).item() == pytest.approx(expected)
    weights = element_weights(TEACHER, EVERYWHERE, *powers, 10.0)
    loss = (weights * (STUDENT - TEACHER) ** 2).mean() / 2
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "power, expected, loss",
    [
        (-1, [0.4, 0.6, 1.2, 1.8], 0.36),
        (0, [1, 1, 1, 1], 0.5),
        (0.5, [1.396038, 1.139860, 0.806003, 0.658099], 0.578443),
        (1, [1.8, 1.2, 0.6, 0.4], 0.65),
    ],
)
def test_macro_weights_of_the_hand_computed_case(power, expected, loss):
    gaps = torch.tensor([0.9, 0.6, 0.3, 0.2], requires_grad=True)
    weights = stage_weights(gaps, power)
    assert weights.tolist() == pytest.approx(expected, rel=1e-5) and not weights.requires_grad
    assert (weights * gaps).mean().item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_macro_weights_are_bounded_and_have_mean_one(power):
    for gaps in ([0.0, 0.0, 0.0], [0.0, 1.0, 1e6], [1e-9, 1.0, 2.0]):
        weights = stage_weights(torch.tensor(gaps), power)
        assert weights.mean().item() == pytest.approx(1) and weights.max() / weights.min() <= 16.01


@pytest.mark.parametrize("powers", [(0, 0), (1, 0), (0.5, 2), (2, 1)])
@pytest.mark.parametrize("max_weight", [1.5, 10.0])
def test_element_weights_equal_a_naive_loop(powers, max_weight):
    _, teacher, valid = random_case()
    weights = element_weights(teacher, valid, *powers, max_weight)
    for n in range(2):
        t, on = np.abs(teacher[n].double().numpy()), valid[n].numpy()
        p, q = t.mean(0), np.array([channel[on].mean() for channel in t])
        p = (p / p[on].mean()) ** powers[0]
        q = (q / q.mean()) ** powers[1]
        w = np.minimum(p / p[on].mean() * (q / q.mean())[:, None, None], max_weight)
        w /= np.mean([channel[on].mean() for channel in w])
        assert np.allclose(weights[n].numpy()[:, on], w[:, on], rtol=1e-5)
        assert (weights[n].numpy()[:, ~on] == 0).all()
        assert weights[n][:, valid[n]].mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", ["energy", "channel_std", "none"])
def test_a_stage_equals_a_naive_mean(distance, norm):
    student, teacher, valid = random_case()
    weights = element_weights(teacher, valid, 1, 1, 3.0)
    scale = squared_scale(teacher, valid, norm)[:, None, None]
    root = scale.sqrt()
    s, t = student / root, teacher / root
    error = {
        "l2": (s - t) ** 2,
        "l1": (s - t).abs(),
        "smooth_l1": torch.nn.functional.smooth_l1_loss(s, t, reduction="none"),
        "partial_l2": torch.where((s <= t) & (t <= 0), torch.zeros(()), (s - t) ** 2),
        "cosine": 1 - torch.cosine_similarity(student, teacher, dim=1)[:, None].expand_as(s),
    }[distance]
    expected = np.mean([(weights * error)[n][:, valid[n]].mean().item() for n in range(2)])
    loss = stage_loss(student, teacher, valid, (1, 1), 3.0, distance, norm)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_goes_to_the_student_alone():
    student, teacher, valid = random_case()
    student.requires_grad_(), teacher.requires_grad_()
    weights = element_weights(teacher, valid, 1, 1, 3.0)
    assert not weights.requires_grad
    stage_loss(student, teacher.detach(), valid, max_weight=3.0).backward()
    scale = squared_scale(teacher, valid)
    count = 2 * 5 * valid.sum((1, 2))[:, None, None, None]
    expected = 2 * weights * (student - teacher) / scale / count
    assert torch.allclose(student.grad, expected.detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("norm", ["energy", "channel_std", "none"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_padding_does_not_matter(distance, norm):
    student, teacher, valid = random_case()
    options = {"distance": distance, "norm": norm}
    expected = stage_loss(student, teacher, valid, **options)
    wider = valid_cells([(48, 64), (35, 21)], (9, 10), 8, "cpu")
    loss = stage_loss(padded(student, 3, 2), padded(teacher, 3, 2, 50.0), wider, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_scale_of_a_stage_does_not_matter(distance):
    student, teacher, valid = random_case()
    expected = stage_loss(student, teacher, valid, distance=distance).item()
    for factor in (1e-3, 1e3):
        loss = stage_loss(factor * student, factor * teacher, valid, distance=distance)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_dead_maps_are_finite():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    for distance in DISTANCES:
        loss = stage_loss(student, torch.zeros(2, 3, 4, 4), valid, distance=distance)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    assert torch.equal(element_weights(student, valid, 1, 1, 10.0), torch.ones(2, 3, 4, 4))


def test_sums_are_float32_under_autocast():
    student, teacher, valid = random_case()
    expected = stage_loss(student.bfloat16().float(), teacher.bfloat16().float(), valid)
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage_loss(student.bfloat16(), teacher.bfloat16(), valid)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=1e-4)


def test_valid_cells_have_their_centre_in_the_image():
    valid = valid_cells([(12, 9), (8, 32), (3, 3)], (2, 4), 8, "cpu")
    assert valid[0].tolist() == [[True, False, False, False], [False] * 4]
    assert valid[1].tolist() == [[True] * 4, [False] * 4]
    assert valid[2].sum() == 1  # smaller than half a cell
    assert valid_cells([(13, 13)], (2, 4), 8, "cpu").sum() == 4


def test_resize_averages_or_interpolates():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(x, (4, 4)) is x
    assert resize(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize(x, (8, 8)).shape == (1, 1, 8, 8)


# The distiller on made-up maps


def level(name, stride, channels):
    return Level(name, stride, channels)


PAIRS = [
    StagePair("stages", level("res2", 4, 3), (level("res2", 4, 3),)),
    StagePair("stages", level("res3", 8, 4), (level("res3", 8, 6),)),
]
FITNETS = {"norm": "none", "spatial_power": 0, "channel_power": 0, "macro_power": 0}


def views(seed=0, sizes=((16, 24), (11, 24)), factor=1.0):
    generator = torch.Generator().manual_seed(seed)

    def maps(widths, scale):
        return {
            name: scale * torch.randn(2, c, 16 // s, 24 // s, generator=generator)
            for (name, s), c in zip((("res2", 4), ("res3", 8)), widths)
        }

    student, teacher = maps((3, 4), 1.0), maps((3, 6), factor)
    images = SimpleNamespace(image_sizes=list(sizes))
    return SimpleNamespace(stages=student, images=images), SimpleNamespace(stages=teacher)


def distiller(pairs=PAIRS, **options):
    torch.manual_seed(0)
    return HGD(pairs=pairs, **options)


def test_without_weights_and_norm_it_is_fitnets():
    model = distiller(**FITNETS)
    student, teacher = views()
    losses = model(student, teacher, None)["feature"]
    for k, name in enumerate(("res2", "res3")):
        error = (model.adapters[k](student.stages[name]) - teacher.stages[name]) ** 2
        valid = valid_cells(student.images.image_sizes, error.shape[-2:], 4 * 2**k, "cpu")
        plain = torch.stack([error[n][:, valid[n]].mean() for n in range(2)]).mean() / 2
        assert torch.allclose(losses[k], plain, rtol=1e-5)


def test_identical_networks_have_no_loss():
    pairs = [StagePair("stages", level("res2", 4, 3), (level("res2", 4, 3),))]
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
        one = SimpleNamespace(
            stages={k: x[n : n + 1] for k, x in student.stages.items()},
            images=SimpleNamespace(image_sizes=student.images.image_sizes[n : n + 1]),
        )
        other = SimpleNamespace(stages={k: x[n : n + 1] for k, x in teacher.stages.items()})
        plain.scales.copy_(torch.ones(2)), plain.gaps.copy_(torch.ones(2))
        plain.norm = "none"
        each.append(plain(one, other, None)["feature"].sum())
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
    pair = StagePair("stages", level("res3", 8, 4), (level("res3", stride, 6),))
    student, _ = views(sizes=((32, 48), (32, 48)))
    student.stages["res3"] = torch.randn(2, 4, 4, 6, requires_grad=True)
    teacher = SimpleNamespace(stages={"res3": torch.randn(2, 6, *size)})
    model = distiller([pair], **FITNETS)
    loss = model(student, teacher, None)["feature"][0]
    adapted, target = model.adapters[0](student.stages["res3"]), teacher.stages["res3"]
    if stride == 4:
        target = torch.nn.functional.avg_pool2d(target, 2)
    else:
        adapted = torch.nn.functional.avg_pool2d(adapted, 2)  # as bilinear does at a factor of 2
    assert torch.allclose(loss, ((adapted - target) ** 2).mean(), rtol=1e-5)
    loss.backward()
    assert student.stages["res3"].grad.abs().sum() > 0


def test_learned_correspondence_finds_the_stage():
    """The teacher's two levels are random; the student is the second of them."""
    levels = (level("p2", 4, 3), level("p3", 8, 3))
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


@pytest.mark.parametrize("stride, size", [(4, (8, 12)), (16, (2, 3))])
def test_unpaired_stages_are_averaged_into_a_pair(stride, size):
    """At the size of the pair's own teacher stage."""
    pair = StagePair("features", level("p3", 8, 4), (level("p3", 8, 6), level("px", stride, 6)))
    student, teacher = views(sizes=((32, 48), (32, 48)))
    student.features = {"p3": torch.randn(2, 4, 4, 6)}
    teacher.features = {"p3": torch.randn(2, 6, 4, 6), "px": torch.randn(2, 6, *size)}
    other = resize(teacher.features["px"], (4, 6))
    target = (teacher.features["p3"] + other) / 2
    model = distiller([pair], **FITNETS)
    expected = (model.adapters[0](student.features["p3"]) - target).square().mean()
    assert torch.allclose(model(student, teacher, None)["feature"][0], expected, rtol=1e-5)
    assert not model.mixing


def test_stages_before_relu_are_read_there():
    student, teacher = views()
    for view in (student, teacher):
        before = {name: x - 0.5 for name, x in view.stages.items()}
        view.stage_before_relu = before.__getitem__
    model = distiller(before_relu=True, **FITNETS)
    needs = model.requires["feature"]
    assert needs.student == needs.teacher == ("stages.res2.pre", "stages.res3.pre")
    losses = model(student, teacher, None)["feature"]
    for view in (student, teacher):
        view.stages = {name: x - 0.5 for name, x in view.stages.items()}
    assert torch.equal(losses, distiller(**FITNETS)(student, teacher, None)["feature"])
    levels = [p._replace(part="features") for p in PAIRS]
    assert distiller(levels, before_relu=True).requires["feature"].student == ("features",)


@pytest.mark.parametrize("macro", ["gap", "per_image", "uncertainty"])
def test_numbers_that_are_logged(macro):
    student, teacher = views()
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 16.0]]), torch.zeros(0, 4)]
    targets = [SimpleNamespace(gt_boxes=SimpleNamespace(tensor=b)) for b in boxes]
    model = distiller(foreground=4.0, max_weight=3.0, macro=macro)
    variances = torch.zeros(2)
    if macro == "uncertainty":
        variances = model.log_variances.data.copy_(torch.tensor([1.0, -1.0]))
    for iteration in (18, 19):
        with EventStorage(iteration) as storage:
            losses = model(student, teacher, targets)["feature"].detach()
        logged = {name: value for name, (value, _) in storage.latest().items()}
        assert len(logged) == (8 if iteration == 19 else 0)
    for k, (name, stride) in enumerate((("res2", 4), ("res3", 8))):
        numbers = [
            logged[f"distill/hgd_feature/{name}/{x}"]
            for x in ("loss", "macro", "max_micro", "on_objects")
        ]
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
    EventStorage().__enter__()
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
