"""DeFeat's masks against a loop, and its formulas by value and gradient."""

import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2kd.methods.defeat import (
    decoupled_classification,
    decoupled_imitation,
    near_zero_adapters,
    object_masks,
)

REFERENCE = os.path.join(os.environ.get("D2KD_REFERENCE", ""), "defeat.npz")
GOLDEN = os.path.join(os.path.dirname(__file__), "golden", "defeat.npz")
CASE = dict(np.load(REFERENCE if os.path.isfile(REFERENCE) else GOLDEN))
LEVELS = range(5)


def tensor(name):
    return torch.from_numpy(CASE[name])


def close(ours, name):
    return ours.item() == pytest.approx(float(CASE[name]), rel=1e-5)


def close_gradient(leaf, name):
    expected = tensor(name)
    return (leaf.grad - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-12)


# --- masks


def loop_masks(boxes, sizes, strides, all_levels=False):
    """The masks cell by cell, as the specification says it."""
    masks = [np.zeros((len(boxes), *size), bool) for size in sizes]
    for n, boxes_of_image in enumerate(boxes):
        for box in boxes_of_image.numpy():
            x1, y1, x2, y2 = box
            scale = np.sqrt((x2 - x1 + np.float32(1)) * (y2 - y1 + np.float32(1)))
            level = int(np.floor(np.log2(scale / np.float32(56) + np.float32(1e-6))))
            level = min(max(level, 0), len(sizes) - 1)
            for k, ((h, w), stride) in enumerate(zip(sizes, strides)):
                if k != level and not all_levels:
                    continue
                left, right = max(int(x1 / stride), 0), min(int(x2 / stride), w)
                top, bottom = max(int(y1 / stride), 0), min(int(y2 / stride), h)
                if left == right or top == bottom:
                    masks[k][n, min(top, h - 1), min(left, w - 1)] = True
                for y in range(top, bottom):
                    for x in range(left, right):
                        masks[k][n, y, x] = left != right and top != bottom
    return [torch.from_numpy(mask) for mask in masks]


def random_boxes(count, height, width, generator):
    """Boxes of all sizes and shapes: thin, on cell edges, of one pixel or none, partly or wholly
    outside of the image."""
    center = torch.rand(count, 2, generator=generator) * torch.tensor([1.3 * width, 1.3 * height])
    center -= torch.tensor([0.15 * width, 0.15 * height])
    size = torch.exp(torch.rand(count, 2, generator=generator) * 7.5 - 1)
    boxes = torch.cat([center - size / 2, center + size / 2], dim=1)
    kind = torch.randint(6, (count,), generator=generator)[:, None]
    boxes = torch.where(kind == 1, (boxes / 8).round() * 8, boxes)
    boxes = torch.where(kind == 2, boxes.clamp(min=0, max=min(height, width)), boxes)
    boxes = torch.where(kind == 3, torch.cat([boxes[:, :2], boxes[:, :2] + 1], dim=1), boxes)
    return torch.where(kind == 4, torch.cat([boxes[:, :2], boxes[:, :2]], dim=1), boxes)


@pytest.mark.parametrize("strides", [[4, 8, 16, 32, 64], [8, 16, 32, 64, 128], [8, 16, 32], [4]])
@pytest.mark.parametrize("all_levels", [False, True])
def test_masks_equal_a_loop_on_thousands_of_boxes(strides, all_levels):
    generator = torch.Generator().manual_seed(len(strides))
    for height, width in ((96, 160), (203, 117)):
        sizes = [(-(-height // s), -(-width // s)) for s in strides]
        # Few boxes per image, so that one does not hide another
        boxes = [random_boxes(i % 4, height, width, generator) for i in range(400)]
        boxes += [random_boxes(30, height, width, generator) for _ in range(3)]
        ours = object_masks(boxes, sizes, strides, "all_levels" if all_levels else "official")
        expected = loop_masks(boxes, sizes, strides, all_levels)
        assert all(m.dtype == torch.bool for m in ours)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_level_of_a_box_is_the_originals():
    """The level is seen from where the mask is."""
    sizes, strides = [(1, 1)] * 5, [4096] * 5
    masks = object_masks([b[None] for b in tensor("lvl_boxes")], sizes, strides)
    levels = torch.cat(masks, dim=1).flatten(1).int().argmax(dim=1)
    assert torch.equal(levels, tensor("lvl_index"))


def test_masks_are_the_originals():
    height, width = CASE["mask_img_hw"].tolist()
    strides = CASE["strides_frcnn"].tolist()
    boxes = [tensor(f"mask_gt{i}") for i in range(3)]
    masks = object_masks(boxes, [(height // s, width // s) for s in strides], strides)
    for i, mask in enumerate(masks):
        assert torch.equal(mask, tensor(f"mask_frcnn_l{i}").bool())


def test_masks_of_a_whole_batch_of_images_without_objects():
    masks = object_masks([torch.zeros(0, 4)] * 2, [(6, 8), (3, 4)], [4, 8])
    assert [m.shape for m in masks] == [(2, 6, 8), (2, 3, 4)]
    assert not any(m.any() for m in masks)


def test_masks_of_one_image_do_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    boxes = [random_boxes(n, 96, 96, generator) for n in (5, 0, 2)]
    together = object_masks(boxes, [(24, 24), (12, 12)], [4, 8])
    alone = [object_masks([b], [(24, 24), (12, 12)], [4, 8]) for b in boxes]
    for i, mask in enumerate(together):
        assert torch.equal(mask, torch.cat([a[i] for a in alone]))


# --- formulas


def neck_terms(masks, adapters):
    """Both weighted terms of the stored case, and the leaves that get gradients."""
    leaves = [tensor(f"kd_s_neck{i}").requires_grad_() for i in LEVELS]
    weights = [tensor(f"kd_adapt_w{i}").requires_grad_() for i in LEVELS]
    terms = []
    for i in LEVELS:
        adapted = leaves[i]
        if adapters:
            adapted = F.conv2d(adapted, weights[i], tensor(f"kd_adapt_b{i}"), padding=1)
        terms.append(decoupled_imitation(adapted, tensor(f"kd_t_neck{i}"), masks[i]))
    objects, backgrounds = (torch.stack(term).sum() / 5 for term in zip(*terms))
    return 3 * objects, 12 * backgrounds, leaves, weights


def case_masks(name):
    return [tensor(f"kd_{name}{i}").bool() for i in LEVELS]


@pytest.mark.parametrize(
    "case, masks, adapters",
    [
        ("A_gtmask_adapt", "gtmask", True),
        ("B_randmask_adapt", "randmask", True),
        ("C_randmask_noadapt", "randmask", False),
    ],
)
def test_imitation_equals_the_original(case, masks, adapters):
    objects, backgrounds, leaves, weights = neck_terms(case_masks(masks), adapters)
    assert close(objects, f"{case}__losskd_neck")
    assert close(backgrounds, f"{case}__losskd_neck_back")
    (objects + backgrounds).backward()
    for i in LEVELS:
        if f"{case[0]}_grad_s_neck{i}" in CASE:
            assert close_gradient(leaves[i], f"{case[0]}_grad_s_neck{i}")
        if f"{case[0]}_grad_adapt_w{i}" in CASE:
            assert close_gradient(weights[i], f"{case[0]}_grad_adapt_w{i}")


def test_masks_of_the_stored_step():
    sizes = [CASE[f"kd_gtmask{i}"].shape[1:] for i in LEVELS]
    boxes = [tensor("kd_gt0"), tensor("kd_gt1")]
    masks = object_masks(boxes, sizes, CASE["kd_strides"].tolist())
    assert all(torch.equal(m, e) for m, e in zip(masks, case_masks("gtmask")))
    (all_boxes,) = object_masks(boxes, sizes[:1], [4])
    assert torch.equal(all_boxes, tensor("kd_bbmask").bool())


def test_imitation_of_backbone_stages_equals_the_original():
    """The adapters end in a ReLU, and all boxes together are brought to the size of each stage."""
    mask = tensor("kd_bbmask").float()[:, None]
    terms = []
    for i in range(3):
        weight, bias = tensor(f"kd_bb_adapt_w{i}"), tensor(f"kd_bb_adapt_b{i}")
        adapted = F.conv2d(tensor(f"kd_s_bb{i + 1}"), weight, bias, padding=1).relu()
        mask_of_stage = F.interpolate(mask, adapted.shape[-2:])[:, 0]
        terms.append(decoupled_imitation(adapted, tensor(f"kd_t_bb{i + 1}"), mask_of_stage))
    objects, backgrounds = (torch.stack(term).mean().item() for term in zip(*terms))
    assert 2 * objects == pytest.approx(1.114179, rel=1e-5)
    assert 8 * backgrounds == pytest.approx(3.114711, rel=1e-5)


@pytest.mark.parametrize(
    "case, temperature", [("F_head_KLdecouple_T1", 1), ("G_head_KLdecouple_T2", 2)]
)
def test_classification_equals_the_original(case, temperature):
    logits = tensor("kd_roi_s_logits").requires_grad_()
    teacher = tensor("kd_roi_t_logits")
    labels = tensor("kd_roi_labels")
    terms = decoupled_classification(logits, teacher, labels, 4, temperature, temperature)
    objects, backgrounds = (2 * term for term in terms)
    assert close(objects, f"{case}__losskd_hcls")
    assert close(backgrounds, f"{case}__losskd_hcls_back")
    (objects + backgrounds).backward()
    assert close_gradient(logits, f"{case[0]}_grad_roi_s_logits")


def test_both_temperatures_are_used():
    s, t, labels = torch.randn(20, 5), torch.randn(20, 5), torch.arange(20) % 5
    cold = decoupled_classification(s, t, labels, 4, 1.0, 1.0)
    warm = decoupled_classification(s, t, labels, 4, 2.0, 5.0)
    assert warm[0] == decoupled_classification(s, t, labels, 4, 2.0, 2.0)[0] != cold[0]
    assert warm[1] == decoupled_classification(s, t, labels, 4, 5.0, 5.0)[1] != cold[1]


def test_an_ignored_region_counts_in_neither_term():
    torch.manual_seed(0)
    s, t, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, -1, 2])
    found, expected = (
        torch.stack(decoupled_classification(s[rows], t[rows], labels[rows], 2, 1.0, 1.0))
        for rows in (slice(None), labels >= 0)
    )
    assert torch.allclose(found, expected)


def test_equal_networks_give_zero():
    x, mask = torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5) > 0.5
    assert decoupled_imitation(x, x, mask) == (0, 0)
    logits = torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, 3, 3, 3])
    assert decoupled_classification(logits, logits, labels, 3, 1.0, 2.0) == (0, 0)


def test_terms_see_only_their_own_region():
    s, t = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    mask = torch.rand(2, 4, 5) > 0.5
    for term, region in zip(decoupled_imitation(s, t, mask), (mask, ~mask)):
        (gradient,) = torch.autograd.grad(term, s, retain_graph=True)
        assert torch.equal(gradient.abs().sum(dim=1) > 0, region)
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 3, 2, 3, 1, 3])
    terms = decoupled_classification(logits, torch.randn(6, 4), labels, 3, 1.0, 1.0)
    for term, region in zip(terms, (labels < 3, labels == 3)):
        (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
        assert torch.equal(gradient.abs().sum(dim=1) > 0, region)


def test_whole_map_is_half_the_mean_squared_error():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    (mask,) = object_masks([torch.zeros(0, 4)] * 2, [(4, 5)], [8], "everywhere")
    objects, backgrounds = decoupled_imitation(s, t, mask)
    assert torch.allclose(objects, F.mse_loss(s, t) / 2) and backgrounds == 0


def test_finite_and_zero_on_empty_regions():
    s, t = torch.randn(1, 2, 3, 3, requires_grad=True), torch.randn(1, 2, 3, 3)
    objects, _ = decoupled_imitation(s, t, torch.zeros(1, 3, 3, dtype=torch.bool))
    none = torch.zeros(0, 5, requires_grad=True)
    terms = decoupled_classification(none, none.detach(), torch.zeros(0).long(), 4, 1.0, 1.0)
    assert objects == 0 and terms == (0, 0)
    (objects + sum(terms)).backward()
    assert torch.equal(s.grad, torch.zeros_like(s)) and none.grad.shape == (0, 5)


def test_sums_are_float32_under_autocast():
    s, t = torch.full((1, 256, 64, 64), 30.0), torch.full((1, 256, 64, 64), -30.0)
    with torch.autocast("cpu", torch.bfloat16):
        objects, _ = decoupled_imitation(s.bfloat16(), t.bfloat16(), torch.ones(1, 64, 64))
        (mask,) = object_masks([torch.tensor([[0.0, 0, 64, 64]])], [(64, 64)], [1])
    assert objects.dtype == torch.float32 and objects.item() == pytest.approx(1800)
    assert mask.all()


def test_values_are_never_read_by_the_host():
    """Tensors on the meta device have none, so anything that waits for a GPU would fail."""
    boxes = [torch.empty(n, 4, device="meta") for n in (3, 0)]
    masks = object_masks(boxes, [(8, 8), (4, 4)], [8, 16])
    x = torch.empty(2, 5, 8, 8, device="meta")
    logits, labels = torch.empty(6, 5, device="meta"), torch.empty(6, device="meta").long()
    terms = decoupled_imitation(x, x, masks[0])
    terms += decoupled_classification(logits, logits, labels, 4, 1.0, 2.0)
    assert all(term.shape == () for term in terms)


def test_adapters_start_near_zero():
    torch.manual_seed(0)
    (conv,) = near_zero_adapters([(256, 256)])
    assert conv.weight.std().item() == pytest.approx(8.66e-5, rel=0.02)
    assert conv.weight.abs().max() < 2e-4
    assert 0.9 / 48 < conv.bias.abs().max() <= 1 / 48
