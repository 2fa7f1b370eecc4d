"""Python and YAML in the documentation: what they import and the keys that they set are there."""

import ast
import re
from pathlib import Path

import pytest
from pages import TODAY, blocks, text

from d2kd.comparison.rows import check_rows, read_rows
from d2kd.config import default_config, read_config

pytestmark = pytest.mark.docs

KEY = re.compile(r"\b((?:DISTILL|SOLVER|MODEL|INPUT|TEST|DATASETS|RUN)(?:\.[A-Z][A-Z0-9_]*)+)\b")
PYTHON = [b for page in TODAY for b in blocks(page) if b.language == "python"]
YAML = [b for page in TODAY for b in blocks(page) if b.language == "yaml"]


def module_of(node):
    return node.module if isinstance(node, ast.ImportFrom) else node.names[0].name


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_its_imports_work(block):
    tree = ast.parse(block.text)
    compile(tree, block.page, "exec")
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = [node for node in imports if not module_of(node).startswith("my_")]  # a reader's own
    exec(compile(ast.Module(imports, type_ignores=[]), block.page, "exec"), {})


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_is_a_config(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a reader has data
    Path("images").mkdir()
    for name in ("train.json", "val.json"):
        Path(name).write_text('{"categories": [{"id": 1, "name": "cat"}]}')
    Path("recipe.yaml").write_text(block.text)
    read_config("recipe.yaml")


@pytest.mark.parametrize("page", TODAY)
def test_config_keys_exist(page):
    cfg = default_config()
    for key in KEY.findall(text(page)):
        node = cfg
        for part in key.split("."):
            if part == "MYMETHOD":
                break
            assert part in node, f"{page} names {key}"
            node = node[part]


def test_the_table_of_rows_is_one(tmp_path):
    [table] = [b.text for b in blocks("docs/training.md") if "ROWS:" in b.text]
    (tmp_path / "mine.yaml").write_text(table)
    rows = read_rows(str(tmp_path / "mine.yaml"))
    check_rows(rows)
    assert [row.label for row in rows][:2] == ["plain student", "FRS"] and len(rows) == 5
