"""The promises of d2kd, over every registered method and every kind of student that it supports."""

import copy
import functools

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils.events import EventStorage
from host_syncs import HostSyncs
from toys import batch

from contract.cells import (
    BOXES,
    EXPECTED,
    SIZES,
    STUDENTS,
    all_cells,
    build_cell,
    counting,
    find_cell,
    plain_steps,
    run_steps,
    with_masks,
)
from d2kd.checkpoint.weights import checksum
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.methods.core import Terms
from d2kd.methods.gdetkd import regions
from d2kd.views.families import BoxHead
from d2kd.views.families.dense import DenseFamily

CELLS = all_cells()


def is_distilled(name):
    return any(name.startswith(f"loss_{m.lower()}_") for m, _ in DISTILLER_REGISTRY)


class Run:
    """A cell, built once and run for two steps: what the promises are checked on."""

    def __init__(self, cell):
        self.cell = cell
        self.model = build_cell([cell])
        self.start = copy.deepcopy(self.model.state_dict())
        self.normalizer = getattr(self.model.student, "loss_normalizer", None)
        self.streams = {k: s.state_dict() for k, s in self.model.random_streams().items()}
        self.teacher_before = checksum(self.model.teacher.detector)
        with counting(self.model) as self.calls:
            self.steps = run_steps(self.model)

    def rewind(self):
        """Back to the start, random numbers included."""
        self.model.load_state_dict(self.start)
        for name, stream in self.model.random_streams().items():
            stream.load_state_dict(self.streams[name])
        if self.normalizer is not None:
            self.model.student.loss_normalizer = self.normalizer
        elif hasattr(self.model.student, "loss_normalizer"):  # made by the first step
            del self.model.student.loss_normalizer
        return self.model


@pytest.fixture(scope="module", params=CELLS, ids=str)
def run(request):
    return Run(request.param)


def test_the_expected_cells_are_there():
    found = {}
    for cell in CELLS:
        found.setdefault(cell.method, []).append(cell.student)
    assert {name for name, _ in DISTILLER_REGISTRY} == set(found), "a method supports nothing"
    assert {name: tuple(found[name]) for name in EXPECTED} == EXPECTED


def test_detection_losses_are_those_of_plain_training(run):
    plain, _, _ = plain_steps(run.cell.student)
    for expected, step in zip(plain, run.steps):
        assert all(torch.equal(step.losses[k], expected.losses[k]) for k in expected.losses)
        names = {f"loss_{run.cell.method}_{term}".lower() for term in run.cell.terms}
        assert set(step.losses) - set(expected.losses) == names


def test_kd_off_is_plain_training_bit_for_bit(run):
    plain, plain_checksum, _ = plain_steps(run.cell.student)
    model = run.rewind()
    for schedule in model.schedules.values():
        schedule.start_iter = 10**6
    with counting(model) as calls:
        steps = run_steps(model, count=3)
    for schedule in model.schedules.values():
        schedule.start_iter = 0
    assert "teacher backbone" not in calls
    for expected, step in zip(plain, steps):
        assert step.losses.keys() == expected.losses.keys()
        assert all(torch.equal(step.losses[k], v) for k, v in expected.losses.items())
        ours = {k[len("student.") :]: v for k, v in step.gradients.items() if "student." in k}
        assert ours.keys() == expected.gradients.keys()
        assert all(torch.equal(ours[k], v) for k, v in expected.gradients.items())
    assert checksum(model.student) == plain_checksum


def test_one_pass_each(run):
    assert run.calls["student backbone"] == run.calls["teacher backbone"] == len(run.steps)
    assert run.calls.get("teacher dense head", 0) in (0, len(run.steps))
    modules = [*run.model.student.modules(), *run.model.teacher.detector.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules), "hooks stay behind"


def test_teacher_stays_as_it_was(run):
    teacher = run.model.teacher.detector
    assert checksum(teacher) == run.teacher_before
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any("teacher" in name for name in run.model.state_dict())


def test_state_dict_of_the_student_is_the_plain_ones(run):
    _, _, names = plain_steps(run.cell.student)
    assert tuple(run.model.student.state_dict()) == names


def test_gradients_reach_student_and_adapters(run):
    """Every trained parameter, in every step: DistributedDataParallel wants that."""
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    plain, _, _ = plain_steps(run.cell.student)
    for step, expected in zip(run.steps, plain):
        assert {n for n in step.gradients if n.startswith("distillers.")} == {
            n for n in trained if n.startswith("distillers.")
        }
        changed = [
            k
            for k, v in expected.gradients.items()
            if not torch.equal(v, step.gradients[f"student.{k}"])
        ]
        assert any("backbone" in k for k in changed), "nothing of the teacher reached the backbone"
        assert all(torch.isfinite(g).all() for g in step.gradients.values())


def test_same_seed_same_step(run):
    again = run_steps(run.rewind())
    for a, b in zip(run.steps, again):
        assert all(torch.equal(a.losses[k], b.losses[k]) for k in a.losses)
        assert all(torch.equal(a.gradients[k], b.gradients[k]) for k in a.gradients)


def test_a_new_process_goes_on_from_what_is_saved(run):
    """Whatever a method remembers is in its state or in its random stream."""
    run_steps(run.rewind(), count=1)
    other = build_cell([run.cell])
    other.load_state_dict(copy.deepcopy(run.model.state_dict()))
    for name, stream in run.model.random_streams().items():
        other.random_streams()[name].load_state_dict(stream.state_dict())
    if hasattr(run.model.student, "loss_normalizer"):
        other.student.loss_normalizer = run.model.student.loss_normalizer
    (expected,), (found,) = run_steps(run.model, count=1), run_steps(other, count=1)
    assert all(torch.equal(found.losses[k], v) for k, v in expected.losses.items())
    assert all(torch.equal(found.gradients[k], v) for k, v in expected.gradients.items())


def test_looking_at_gradients_does_not_change_a_step(run, monkeypatch):
    model = run.rewind()
    monkeypatch.setattr(model, "balance_period", 1)
    (step,) = run_steps(model, count=1)
    assert all(torch.equal(value, run.steps[0].losses[name]) for name, value in step.losses.items())
    gradients = run.steps[0].gradients
    assert all(torch.equal(value, gradients[name]) for name, value in step.gradients.items())


# Methods all of whose terms are sums over anchors that learn an object
ON_OBJECTS_ALONE = ("LD",)


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_finite_and_differentiable_on_odd_images(run, boxes):
    (step,) = run_steps(run.rewind(), count=1, boxes=boxes, chosen=is_distilled)
    distilled = {k: v for k, v in step.losses.items() if is_distilled(k)}
    assert len(distilled) == len(run.cell.terms)
    assert all(torch.isfinite(v) for v in distilled.values())
    assert all(torch.isfinite(g).all() for g in step.gradients.values())
    student = [g for name, g in step.gradients.items() if name.startswith("student.")]
    learns = any(boxes) or run.cell.method not in ON_OBJECTS_ALONE
    assert any(g.any() for g in student) == learns


# Terms on sampled regions: in half precision others are sampled
ON_REGIONS = ("loss_gdetkd", "loss_defeat_head")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32_under_autocast(run, dtype):
    with torch.autocast("cpu", dtype):
        (step,) = run_steps(run.rewind(), count=1, backward=False)
    for name, value in step.losses.items():
        if is_distilled(name):
            tolerance = 0.3 if name.startswith(ON_REGIONS) else 0.02
            assert value.dtype == torch.float32, name
            torch.testing.assert_close(value, run.steps[0].losses[name], rtol=tolerance, atol=1e-3)


def test_values_have_the_announced_shape(run):
    for (method, term), value in run.model.last_terms.items():
        levels = run.model.distillers[method].levels_of(term)
        assert value.shape == ((levels,) if levels else ()), (method, term)


def test_diagnostics_are_scalars(run):
    model = run.rewind()
    kept = {}
    for name, distiller in model.distillers.items():
        handle = distiller.register_forward_hook(lambda _, __, out, n=name: kept.update({n: out}))
        run_steps(model, count=1, backward=False)
        handle.remove()
    for values in kept.values():
        if isinstance(values, Terms):
            assert values.diagnostics.keys() <= values.keys()
            scalars = [x for measure in values.diagnostics.values() for x in measure().values()]
            assert all(x.dim() == 0 for x in scalars)


@functools.cache
def pairs_of(student):
    """The methods that share student and teacher."""
    cells = [find_cell(method, student) for method, _ in DISTILLER_REGISTRY]
    return [cell for cell in cells if cell is not None and cell.teacher == student]


@pytest.mark.parametrize("student", STUDENTS)
def test_methods_together_are_what_each_is_alone(student):
    cells = pairs_of(student)
    assert len(cells) > 3
    model = build_cell(cells)
    with counting(model) as calls:
        (together,) = run_steps(model, count=1)
    assert calls["student backbone"] == calls["teacher backbone"] == 1
    assert calls.get("teacher dense head", 0) == 1
    for cell in cells:
        alone_model = build_cell([cell])
        state = model.teacher.random.state_dict()
        alone_model.teacher.random.load_state_dict(state)
        (alone,) = run_steps(alone_model, count=1, backward=False)
        for name in (f"loss_{cell.method}_{term}".lower() for term in cell.terms):
            if "head" in name:  # on proposals of the teacher's, which it draws anew
                continue
            torch.testing.assert_close(together.losses[name], alone.losses[name], rtol=1e-5, atol=0)


def test_no_line_of_ours_makes_the_host_wait(run):
    with HostSyncs(run.rewind().student) as syncs:
        run_steps(run.model, count=1)
    assert not syncs.found


# Functions of d2kd that call Detectron2's matching, sampling, suppression and pooling, which wait
# for the device: they are left out.
CALL_DETECTRON2 = (
    (DenseFamily, "assign"),
    (BoxHead, "run"),
    (regions, "sample_predicted_boxes"),
    (ROIPooler, "forward"),
)


def test_what_may_wait_is_there():
    """It is looked up on a machine with a GPU alone."""
    assert all(callable(getattr(owner, name, None)) for owner, name in CALL_DETECTRON2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_host_sync_in_distillers(run, monkeypatch):
    model = copy.deepcopy(run.model).cuda()
    for distiller in model.distillers.values():
        distiller.forward = _with_sync_mode("error", distiller.forward)
    for owner, name in CALL_DETECTRON2:
        monkeypatch.setattr(owner, name, _with_sync_mode("default", getattr(owner, name)))
    model.train()
    with EventStorage(1000):
        for _ in range(2):  # the first step may set up caches
            sum(model(with_masks(batch(SIZES))).values()).backward()


def _with_sync_mode(mode, function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return wrapped
