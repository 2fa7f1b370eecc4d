"""How far two distributions are apart."""

import torch

from d2kd.layers import kl_divergence


def test_distributions_of_half_precision_are_compared_in_float32():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 5).half()
    expected = kl_divergence(ours.float(), theirs.float(), temperature=3.0)
    assert torch.equal(kl_divergence(ours, theirs, temperature=3.0), expected)
