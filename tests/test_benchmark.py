"""The tool that measures what distillation costs."""

import os
import sys

import pytest
import torch
from toys import STUDENTS

TOOLS = os.path.join(os.path.dirname(__file__), os.pardir, "tools")
KIB = torch.zeros(256)  # float32


def test_peak_memory_is_exact(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from benchmark import peak_memory

    before = [KIB.repeat(1000)]

    def step():
        before.clear()  # what stood before does not count
        first = KIB.repeat(300)
        second = first + 1
        del first
        return second.repeat(2)

    for _ in range(2):
        assert peak_memory(step, "cpu") == pytest.approx(900 / 1024, abs=1e-4)
    assert peak_memory(lambda: None, "cpu") == 0


def test_table_of_a_recipe(monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    import benchmark

    argv = ["benchmark.py", "shapes/crosskd_fcos_tiny.yaml", "--size", "64", "--rounds", "1"]
    argv += ["--ops", "3"]
    monkeypatch.setattr(sys, "argv", [*argv, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    plain, distilled = (next(x for x in lines if x.startswith(f"| {k}:")) for k in "ac")
    plain, distilled = (float(x.split("|")[3]) for x in (plain, distilled))
    ratio = float(next(x for x in lines if x.startswith("memory")).split("c/a ")[1])
    assert 0 < plain <= distilled and ratio == pytest.approx(distilled / plain, rel=0.5)
    assert all("::" in x or "Backward" in x or "_" in x for x in lines[-3:])


def test_nothing_to_compare_is_one_line(monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    import benchmark

    monkeypatch.setattr(sys, "argv", ["benchmark.py", STUDENTS["FCOS"], "MODEL.DEVICE", "cpu"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert capsys.readouterr().err.startswith("error: ")
