"""The messages that the documentation explains are those of the code."""

import ast
import re

import pytest
from pages import ROOT, text

pytestmark = pytest.mark.docs

MESSAGE = re.compile(r"^#### `(.*)`$", re.MULTILINE)


def template(node):
    """A text in the code with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "".join(parts)


@pytest.fixture(scope="module")
def templates():
    """All texts in the code but docstrings."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "d2kd").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [n for n in nodes if isinstance(n, (ast.JoinedStr, ast.Constant))]
    return [template(node) for node in texts if id(node) not in docstrings]


@pytest.mark.parametrize("message", MESSAGE.findall(text("docs/troubleshooting.md")))
def test_a_message_that_is_explained_can_come(templates, message):
    wanted = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    assert any(wanted.search(text) for text in templates), f"nothing in d2kd says {message}"
