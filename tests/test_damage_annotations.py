"""``tools/damage_annotations.py``: as many as asked for, and nothing else."""

import json
import os
import sys
from collections import Counter

import pytest

TOOLS = os.path.join(os.path.dirname(__file__), os.pardir, "tools")
COCO = {
    "images": [{"id": i} for i in range(10)],
    "categories": [{"id": i} for i in (1, 4, 9)],
    "annotations": [
        {"id": i, "image_id": i % 10, "category_id": (1, 4, 9)[i % 3], "bbox": [i, 0, 5, 5]}
        for i in range(300)
    ],
}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import damage_annotations

    return damage_annotations


def test_shares_of_wrong_and_missing_annotations(tool):
    damaged = tool.damaged(COCO, wrong=0.2, missing=0.3, seed=0)
    assert (damaged["images"], damaged["categories"]) == (COCO["images"], COCO["categories"])
    before = {a["id"]: a for a in COCO["annotations"]}
    assert len(damaged["annotations"]) == 210
    changed = [a for a in damaged["annotations"] if a != before[a["id"]]]
    assert len(changed) == 60
    assert all({**a, "category_id": 0} == {**before[a["id"]], "category_id": 0} for a in changed)
    moves = Counter((before[a["id"]]["category_id"], a["category_id"]) for a in changed)
    assert len(moves) == 6  # each class becomes each of the others


def test_the_draw_is_that_of_the_seed(tool):
    first, again, other = (tool.damaged(COCO, 0.1, 0.1, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_command(tool, tmp_path, monkeypatch, capsys):
    source, output = tmp_path / "a.json", tmp_path / "b.json"
    source.write_text(json.dumps(COCO))
    argv = ["damage_annotations.py", str(source), str(output)]
    monkeypatch.setattr(sys, "argv", [*argv, "--missing", "0.5"])
    tool.main()
    assert len(json.loads(output.read_text())["annotations"]) == 150
    assert capsys.readouterr().out == f"{output}: 150 of 300 annotations\n"
    monkeypatch.setattr(sys, "argv", [*argv, "--wrong", "0.7", "--missing", "0.5"])
    with pytest.raises(SystemExit, match="give shares"):
        tool.main()
