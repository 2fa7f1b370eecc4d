"""What losses depend on."""

from typing import Iterable, Set

from torch import Tensor


def parameters_reached(losses: Iterable[Tensor]) -> Set[Tensor]:
    """The parameters, and other leaves of the graph, that ``backward`` of these losses gives a
    gradient to."""
    nodes = [x.grad_fn for x in losses if x.grad_fn is not None]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(leaf)
        new = {below for below, _ in node.next_functions if below is not None} - seen
        seen |= new
        nodes.extend(new)
    return found
