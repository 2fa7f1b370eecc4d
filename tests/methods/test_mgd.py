"""MGD: masks and loss by value and gradient, and its adapters and generators."""

import pytest
import torch
from toys import batch, distill_config, step

from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.methods.mgd import build_generator, generative_imitation, mask_locations


def test_equals_a_naive_loop():
    torch.manual_seed(0)
    generated, teacher = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    total = 0.0
    for n in range(2):
        for c in range(3):
            for y in range(2):
                for x in range(4):
                    total += float(generated[n, c, y, x] - teacher[n, c, y, x]) ** 2
    loss = generative_imitation(generated, teacher)
    assert loss.item() == pytest.approx(total / 2, rel=1e-5)


def test_of_one_location_is_as_computed_by_hand():
    """1 - 2 x 3 = -5 is cut to 0 by the ReLU, 1 + 2 x 3 = 7 stays: 0.5 + 4 x 0 and 0.5 + 4 x 7."""
    for weight, expected in ((-2.0, 0.5), (2.0, 28.5)):
        generator = build_generator(1)
        with torch.no_grad():
            for conv, centre, bias in ((generator[0], weight, 1.0), (generator[2], 4.0, 0.5)):
                conv.weight.zero_()[0, 0, 1, 1] = centre
                conv.bias.fill_(bias)
        generated = generator(mask_locations(torch.full((1, 1, 1, 1), 3.0), ratio=0.0))
        assert generated.item() == expected
        loss = generative_imitation(generated, torch.full((1, 1, 1, 1), 10.0))
        assert loss.item() == (expected - 10) ** 2


def test_images_of_a_batch_are_averaged():
    generated, teacher = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    alone = [generative_imitation(generated[i : i + 1], teacher[i : i + 1]) for i in range(3)]
    assert torch.allclose(generative_imitation(generated, teacher), torch.stack(alone).mean())


def test_a_location_is_masked_in_all_channels_or_in_none():
    torch.manual_seed(0)
    features = torch.rand(3, 8, 60, 70) + 1
    masked = mask_locations(features, 0.65)
    zero = masked == 0
    assert torch.equal(zero.any(dim=1), zero.all(dim=1))
    assert torch.equal(masked[~zero], features[~zero])
    shares = zero[:, 0].float().mean(dim=(1, 2))
    assert shares.tolist() == pytest.approx([0.65] * 3, abs=0.03)
    assert not torch.equal(zero[0], zero[1]), "every image has a mask of its own"


def test_masks_come_from_the_global_generator():
    features = torch.rand(2, 3, 8, 8)
    torch.manual_seed(5)
    first, second = (mask_locations(features, 0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(mask_locations(features, 0.5), first)
    assert not torch.equal(first, second)


def test_masked_locations_get_no_gradient_and_nothing_of_their_value_is_left():
    features = torch.randn(2, 3, 8, 8)
    features[0, 0, 0, 0] = float("inf")
    features.requires_grad_()
    torch.manual_seed(1)
    masked = mask_locations(features, 0.99)
    assert (masked[:, 0] == 0).any() and masked[0, 0, 0, 0] == 0
    masked.sum().backward()
    assert torch.equal(features.grad != 0, masked != 0)


def test_gradient():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 3, 2, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(2, 3, 3, 2, dtype=torch.double)
    generator = build_generator(3).double()

    def loss(x):
        torch.manual_seed(1)  # the same mask
        return generative_imitation(generator(mask_locations(x, 0.5)), teacher)

    assert torch.autograd.gradcheck(loss, student)


def test_the_teacher_gets_no_gradient():
    generated, teacher = (torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(2))
    generative_imitation(generated, teacher).backward()
    assert teacher.grad is None and generated.grad is not None


def test_an_adapter_is_trained_where_the_widths_differ(tmp_path):
    opts = ["MODEL.FPN.OUT_CHANNELS", 96]
    model = build_model(distill_config(tmp_path, "FCOS", teacher_opts=opts, methods=("MGD",)))
    distiller = model.distillers["MGD"]
    step(model, batch())["loss_mgd_feature"].backward()
    assert model.last_terms["MGD", "feature"].shape == (len(distiller.adapters),) == (5,)
    adapters = distiller.adapters
    assert all(a.weight.shape == (96, 64, 1, 1) and a.bias.shape == (96,) for a in adapters)
    assert all(g[i].weight.shape == (96, 96, 3, 3) for g in distiller.generators for i in (0, 2))
    assert all(p.grad.norm() > 0 for p in distiller.parameters())


def test_between_equal_widths_only_the_generators_are_trained(tmp_path):
    model = build_model(distill_config(tmp_path, "FCOS", methods=("MGD",)))
    assert not list(model.distillers["MGD"].adapters.parameters())


def test_detectors_of_another_kind_share_the_levels_of_equal_stride(tmp_path):
    cfg = distill_config(tmp_path, "FasterRCNN", teacher="RetinaNet", methods=("MGD",))
    model = build_model(cfg)  # P2 ... P6 and P3 ... P7
    assert len(model.distillers["MGD"].generators) == 4
    assert torch.isfinite(step(model, batch())["loss_mgd_feature"])


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_refuses_a_share_that_masks_everything_or_less_than_nothing(tmp_path, ratio):
    key = "DISTILL.MGD.MASK_RATIO"
    with pytest.raises(UserError, match=rf"{key} is {ratio}: give 0 ... 0.99"):
        distill_config(tmp_path, "FCOS", [key, ratio], methods=("MGD",))
