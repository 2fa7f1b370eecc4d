"""Two processes on a CPU against one: what the terms of every method come to, and whole steps. The
table of docs/several-processes.md says the same."""

import argparse

import pytest
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from torch import nn
from toys import batch, config

from d2kd.engine.processes import join, leave, start_processes, wrap_ddp

from .cells import DENSE, all_cells, build_cell, find_cell

# One image for each process, with objects of another number
INPUTS = [
    batch([(64, 96)], [[[5, 5, 60, 50], [30, 10, 90, 60], [3, 30, 40, 62]]], seed=1),
    batch([(64, 96)], [[[40, 8, 70, 44]]], seed=2),
]
WHOLE_BATCH = INPUTS[0] + INPUTS[1]
DENSE_KD = ("CrossKD", "Mimicking")
STUDENTS = {**dict.fromkeys(DENSE_KD, DENSE), "LD": ("GFL",)}
USUAL_STUDENTS = ("FCOS", "FasterRCNN")

# What the gradient of a term is over two processes: that of the whole batch; or the mean of what
# both come to alone, but divided by the normaliser of both, as the authors' code does for these
# students; or nothing that a process could come to alone, since regions are compared with those of
# both (tests/methods/test_gdetkd_distributed.py has the values). All other terms: that mean.
OF_WHOLE_BATCH = {("HGD", "feature")}
NORMALIZED_TOGETHER = {
    "cls": ("FCOS", "PaperFCOS", "ATSS", "GFL"),
    "bbox": ("FCOS", "PaperFCOS", "ATSS"),
    "centerness": ("FCOS", "PaperFCOS", "ATSS"),
}
COMPARED_WITH_ALL = {("GDetKD", "ckd")}

# Students whose own losses are normalised over all processes, with methods that do likewise
WHOLE_STEPS = [("ATSS", "Mimicking"), ("GFL", "LD")]


def cells():
    return [c for c in all_cells() if c.student in STUDENTS.get(c.method, USUAL_STUDENTS)]


CASES = [(cell, term) for cell in cells() for term in cell.terms]


def new_model(cell):
    """In training, but for batch normalisation: no image depends on another one."""
    torch.manual_seed(0)
    model = build_cell([cell])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def losses_of(model, inputs):
    torch.manual_seed(0)
    with EventStorage(1000):
        return model(inputs)


def gradient(model, loss):
    """Of all parameters, in one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
    return torch.cat([g.flatten() for g in filled])


def gradients_of_terms(cell, inputs):
    """By term, and what the method divides by where it reduces that."""
    model, normalizers = new_model(cell), []
    distiller = model.distillers[cell.method]
    if hasattr(distiller, "normalizer"):
        distiller.register_forward_pre_hook(
            lambda module, views: normalizers.append(
                getattr(views[0].assignment, module.normalizer)
            )
        )
    losses = losses_of(model, inputs)
    terms = {t: gradient(model, losses[f"loss_{cell.method}_{t}".lower()]) for t in cell.terms}
    return terms, normalizers


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def change_by_steps(student, method, inputs, cfg):
    """What two steps with momentum do to the weights of a detector and a method."""
    model = new_model(find_cell(method, student))
    # Scores of one half: GFL divides by a sum of scores, by 1 at least in every process
    nn.init.zeros_(model.student.head.cls_score.bias)
    model = wrap_ddp(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    before = weights(model)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses_of(model, inputs).values()).backward()
        optimizer.step()
    return weights(model) - before


def work(place, store, args, cfg):
    torch.set_num_threads(1)
    join(place, store, cfg)
    inputs, means = INPUTS[place.rank], {}
    for cell in cells():
        for term, value in gradients_of_terms(cell, inputs)[0].items():
            dist.all_reduce(value)
            means[str(cell), term] = value / place.world_size
    steps = {s: change_by_steps(s, m, inputs, cfg) for s, m in WHOLE_STEPS}
    torch.save((means, steps), f"{args.folder}/{place.rank}.pth")
    leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Of both processes, the gradients of all terms and what whole steps change."""
    folder = tmp_path_factory.mktemp("two")
    args = argparse.Namespace(
        num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", debug=True, folder=folder
    )
    start_processes(work, args, config("shapes/baselines/fcos_tiny.yaml"))
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


@pytest.fixture(scope="module")
def one():
    """The gradients of all terms in one process, for both images and for their batch."""
    inputs = (*INPUTS, WHOLE_BATCH)
    return {str(cell): [gradients_of_terms(cell, x) for x in inputs] for cell in cells()}


def assert_equal(one, other):
    assert one.norm() > 0 and (one - other).norm() / one.norm() < 1e-5


@pytest.mark.parametrize("cell, term", CASES, ids=lambda x: str(x))
def test_what_the_gradient_of_a_term_is_over_two_processes(two, one, cell, term):
    found = two[0][0][str(cell), term]
    ours, theirs, whole = (terms[term] for terms, _ in one[str(cell)])
    mean = (ours + theirs) / 2
    if (cell.method, term) in COMPARED_WITH_ALL:
        assert (found - mean).norm() > 1e-3 * mean.norm()
    elif (cell.method, term) in OF_WHOLE_BATCH:
        assert_equal(found, whole)
    elif cell.method in DENSE_KD and cell.student in NORMALIZED_TOGETHER[term]:
        n, m = (normalizer for _, [normalizer] in one[str(cell)][:2])
        assert n != m
        assert_equal(found, (n * ours + m * theirs) / (n + m))
    else:
        assert_equal(found, mean)


@pytest.mark.parametrize("student, method", WHOLE_STEPS)
def test_steps_of_two_half_batches_are_those_of_the_whole_batch(two, student, method):
    (_, ours), (_, theirs) = two
    assert torch.equal(ours[student], theirs[student])
    cfg = config("shapes/baselines/fcos_tiny.yaml")
    assert_equal(change_by_steps(student, method, WHOLE_BATCH, cfg), ours[student])
