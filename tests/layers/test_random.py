"""A stream of random numbers of its own: it shifts nobody's, and nobody shifts it."""

import pytest
import torch

from d2kd.layers import RandomStream


def draw(stream):
    with stream:
        return torch.rand(4)


def test_outside_nothing_was_drawn():
    torch.manual_seed(0)
    expected = torch.rand(8)
    torch.manual_seed(0)
    stream = RandomStream(seed=1)
    first = torch.rand(4)
    draw(stream), draw(stream)
    assert torch.equal(torch.cat([first, torch.rand(4)]), expected)


def test_inside_the_stream_goes_on_whatever_happens_outside():
    expected = torch.rand(8, generator=torch.Generator().manual_seed(3))
    stream = RandomStream(seed=3)
    first = draw(stream)
    torch.manual_seed(7), torch.rand(5)
    assert torch.equal(torch.cat([first, draw(stream)]), expected)
    assert torch.equal(draw(RandomStream(seed=3)), first)
    assert not torch.equal(draw(RandomStream(seed=4)), first)


def test_streams_within_each_other_stay_apart():
    alone = draw(RandomStream(seed=1)), draw(RandomStream(seed=2))
    outer, inner = RandomStream(seed=1), RandomStream(seed=2)
    with outer:
        first = torch.rand(2)
        within = draw(inner)
        first = torch.cat([first, torch.rand(2)])
    assert torch.equal(first, alone[0]) and torch.equal(within, alone[1])


def test_an_error_inside_leaves_the_outside_as_it_was():
    stream, state = RandomStream(seed=1), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), stream:
        first = torch.rand(2)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)
    with stream:
        assert not torch.equal(torch.rand(2), first), "what was drawn is drawn"


def test_a_saved_stream_goes_on_where_it_was(tmp_path):
    stream = RandomStream(seed=1)
    draw(stream)
    torch.save(stream.state_dict(), tmp_path / "stream.pth")
    expected = draw(stream)
    resumed = RandomStream(seed=9)
    resumed.load_state_dict(torch.load(tmp_path / "stream.pth", weights_only=True))
    assert torch.equal(draw(resumed), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_has_its_own_place_in_the_stream():
    def rand():
        return torch.rand(4, device="cuda")

    def draw_there(stream):
        with stream:
            return rand()

    torch.cuda.manual_seed(0)
    expected = [rand(), rand()]
    torch.cuda.manual_seed(0)
    stream = RandomStream(seed=1)
    first, drawn, second = rand(), draw_there(stream), rand()
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    resumed = RandomStream(seed=9)
    resumed.load_state_dict(stream.state_dict())
    assert torch.equal(draw_there(resumed), draw_there(stream))
    assert torch.equal(draw_there(RandomStream(seed=1)), drawn)


def test_a_stream_inside_of_itself_goes_on():
    """A method may ask for its stream although it runs inside of it."""
    plain, nested = RandomStream(seed=1), RandomStream(seed=1)
    torch.manual_seed(7)
    expected = [(draw(plain), torch.rand(3)) for _ in range(2)]
    torch.manual_seed(7)
    found = []
    for _ in range(2):
        with nested:
            drawn = draw(nested)
        found.append((drawn, torch.rand(3)))
    for a, b in zip(expected, found):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
