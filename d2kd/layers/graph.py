"""What a loss depends on."""

from typing import Iterable, Set

from torch import Tensor


def leaves(losses: Iterable[Tensor]) -> Set[Tensor]:
    """The tensors, such as parameters, that backward gives a gradient of these losses."""
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
