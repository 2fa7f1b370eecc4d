"""Names that somebody chose, in figures."""

import io

import pytest
from matplotlib.figure import Figure

from d2kd.labels import as_label


@pytest.mark.parametrize("name", ["$x_{$", "a$b_{$c", "US$ and $^ bill", "_hidden", "plain", ""])
def test_every_name_can_be_drawn_and_is_in_the_legend(name):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], label=as_label(name))
    axes.set_xticks([0], [as_label(name)])
    axes.legend() if name else None
    figure.savefig(io.BytesIO())
    assert len(axes.get_legend_handles_labels()[0]) == bool(name)
