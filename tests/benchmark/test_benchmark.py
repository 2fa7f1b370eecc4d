"""``d2kd benchmark``: what distillation costs."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from toys import STUDENTS

from d2kd.benchmark import measuring
from d2kd.benchmark.costs import growth_text, read_costs
from d2kd.benchmark.measuring import STANDARD, Case, Costs, Load
from d2kd.benchmark.profile import gflops, peak_memory
from d2kd.cli.main import main
from d2kd.errors import UserError
from d2kd.views.families import BoxHead, Pixels

KIB = torch.zeros(256)  # float32


def test_peak_memory_is_exact():
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


def test_flops_are_those_of_convolutions_forward_and_backward():
    frozen = torch.nn.Conv2d(3, 5, 1).requires_grad_(False)
    x = torch.rand(1, 3, 10, 10, requires_grad=True)
    once = 3 * 5 * 100 / 1e9
    assert gflops(lambda: frozen(x)) == pytest.approx(once)
    assert gflops(lambda: frozen(x).sum().backward()) == pytest.approx(2 * once)
    trained = torch.nn.Conv2d(3, 5, 1)
    assert gflops(lambda: trained(x).sum().backward()) == pytest.approx(3 * once)


def test_other_devices_have_no_clock():
    case = Case("shapes/frs/fcos_tiny.yaml", ("MODEL.DEVICE", "mps"))
    with pytest.raises(UserError, match="MODEL.DEVICE is 'mps': cpu and cuda can be measured"):
        measuring.measure(case, Load())


SMALL = ["--size", "64", "--rounds", "2"]
CPU = ["MODEL.DEVICE", "cpu"]
RECIPE = "shapes/crosskd/fcos_tiny.yaml"
# What CrossKD adds there, on the 86 locations of five levels of two images: per branch a 3x3
# convolution of 64 channels and one to 6 classes or 4 sides, forward and towards the features, and
# the centerness that comes with the sides, forward
TAIL = (2 * (2 * 64 + 6 + 4) + 1) * 64 * 9 * 86 * 2 / 1e9


def test_table_of_a_recipe(capsys):
    other = "SOLVER.CHANNELS_LAST True"
    main(["benchmark", RECIPE, *SMALL, "--ops", "3", "--beside", other, *CPU])
    lines = capsys.readouterr().out.splitlines()
    plain, distilled = (next(x for x in lines if x.startswith(f"| {k}: ")) for k in "ac")
    plain, distilled = (float(x.split("|")[3]) for x in (plain, distilled))
    ratio = float(next(x for x in lines if x.startswith("memory")).split("c/a ")[1])
    assert 0 < plain <= distilled and ratio == pytest.approx(distilled / plain, rel=0.5)
    assert sum(x.startswith("c/(a+b) ") for x in lines) == 2
    assert any(x.startswith("c/(a+b) ") and x.endswith(f": {other}") for x in lines)
    listed = lines[next(i for i, x in enumerate(lines) if x.startswith("| operation")) + 2 :]
    milliseconds = [float(x.split("|")[2]) for x in listed]
    assert len(milliseconds) == 3 and milliseconds == sorted(milliseconds, reverse=True)


def test_a_python_config(capsys):
    words = ["--size", "64", "--rounds", "1", "--device", "cpu"]
    main(["benchmark", "shapes/frs/fcos_tiny_lazy.py", *words])
    assert "c/(a+b) " in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[1]", "[{}]", "[", "\xff"])
def test_other_json_is_refused_before_anything_is_measured(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match="x.json is not what d2kd benchmark writes"):
        read_costs(str(path))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--markdown", "nowhere/table.md"], "there is no folder 'nowhere': make it first"),
        (["--boxes", "-3"], "--boxes is -3: give 0 or more"),
        (["--growth", "size 0 1"], "--growth size: '0' is no whole number above 0"),
        (["--growth", "size ² 3"], "--growth size: '²' is no whole number above 0"),
    ],
)
def test_wrong_words_are_told_at_once(words, said, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", RECIPE, *words, *CPU])
    assert said in capsys.readouterr().err


def test_several_recipes_as_data_and_as_markdown(tmp_path, capsys):
    data, table = str(tmp_path / "costs.json"), tmp_path / "table.md"
    files = ["--json", data, "--markdown", str(table)]
    main(["benchmark", RECIPE, *SMALL, *files, *CPU])
    first = read_costs(data)
    main(["benchmark", RECIPE, "shapes/frs/fcos_tiny.yaml", *SMALL, *files, *CPU])
    both = read_costs(data)
    assert both[0] == first[0], "what is there is not measured again"
    assert [c.case.recipe for c in both] == [RECIPE, "shapes/frs/fcos_tiny.yaml"]
    assert all(len(x) == 2 for c in both for x in c.seconds.values())
    assert set(both[0].seconds) == set("abtc") and set(both[0].memory) == set("ac")
    assert all(set(c.gflops) == set("abc") for c in both)
    tail = both[0].gflops["c"] - both[0].gflops["a"] - both[0].gflops["b"]
    assert tail == pytest.approx(TAIL), "what CrossKD adds are the convolutions of the tail"
    rows = table.read_text().splitlines()[2:]
    assert [RECIPE in rows[0], "shapes/frs/fcos_tiny.yaml" in rows[1], len(rows)] == [1, 1, 2]


def test_growth_over_a_load_and_over_a_key(capsys):
    main(["benchmark", RECIPE, *SMALL, "--growth", "batch 1 2", *CPU])
    assert "slopes: a " in capsys.readouterr().out
    key = "DISTILL.CROSSKD.TEMPERATURE"
    main(["benchmark", RECIPE, *SMALL, "--growth", f"{key} 1.0 2.0", *CPU])
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")]
    assert key in rows[0] and [x.split("|")[1].strip() for x in rows[-2:]] == ["1.0", "2.0"]


def test_slope_of_growth():
    sizes = ["1", "2", "4"]
    costs = [
        Costs(
            Case("x"),
            Load(),
            "CPU",
            "2",
            {"a": [3.0], "b": [float(n)], "c": [float(n) ** 2]},
            {"c": 1.0},
            {},
            {},
            {},
        )
        for n in sizes
    ]
    assert growth_text("batch", sizes, costs).endswith("slopes: a 0.00, b 1.00, c 2.00")


def test_values_without_a_slope_are_shown_without():
    seconds = dict.fromkeys("abc", [1.0])
    costs = [Costs(Case("x"), Load(), "CPU", "2", seconds, {"c": 1.0}, {}, {}, {})]
    for values in (["0", "8"], ["student", "teacher"]):
        assert "slopes" not in growth_text("KEY", values, costs * 2)


def test_no_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", RECIPE, "--rounds", "0", *CPU])
    assert capsys.readouterr().err.startswith("error: --rounds is 0: give 1 or more")


@pytest.mark.parametrize("growth", [" ", "batch 1", "rounds 1 2", "size 64 wide"])
def test_wrong_growth_is_one_line(growth, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", RECIPE, *SMALL, "--growth", growth, *CPU])
    assert capsys.readouterr().err.startswith("error: --growth")


def test_the_table_of_the_documents_can_be_built():
    for case in STANDARD:
        assert case.as_stock().DISTILL.METHODS, case


def test_nothing_to_compare_is_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", STUDENTS["FCOS"], "MODEL.DEVICE", "cpu"])
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "recipe, passes", [("defeat/faster_rcnn_tiny", 2), ("gdetkd/retinanet_faster_rcnn_tiny", 1)]
)
def test_the_teachers_forward_is_of_the_regions_that_are_compared(monkeypatch, recipe, passes):
    """DeFeat's box head runs on both sets of proposals, G-DetKD's on its own regions, once."""
    calls = []
    run = BoxHead.run
    monkeypatch.setattr(BoxHead, "run", lambda *args: calls.append(1) or run(*args))
    opts = ["MODEL.DEVICE", "cpu", "DISTILL.DEFEAT.PROPOSALS_FROM", "both"]
    cfg = Case(f"shapes/{recipe}.yaml", opts).config()
    model = measuring.random_pair(cfg)
    inputs = measuring.random_batch(Load(size=64), model.family, cfg.MODEL)
    with EventStorage():
        forward = measuring._teacher_forward(model, inputs, amp=False)
        calls.clear()
        forward()
    assert len(calls) == passes


def test_objects_of_an_unknown_number_of_classes_are_of_the_first():
    cfg = Case("shapes/frs/fcos_tiny.yaml", []).config()
    student = SimpleNamespace(num_classes=None, pixels=Pixels((0.0,), (1.0,), 0))
    inputs = measuring.random_batch(Load(size=64), student, cfg.MODEL)
    assert all(x["image"].shape == (1, 64, 64) for x in inputs)
    assert all(len(x["instances"]) and not x["instances"].gt_classes.any() for x in inputs)


@pytest.mark.parametrize("heads", [["MODEL.MASK_ON", True], ["MODEL.KEYPOINT_ON", True]])
def test_students_with_other_heads_find_their_ground_truth(heads):
    opts = ["MODEL.DEVICE", "cpu", "DISTILL.TEACHER.OPTS", heads, *heads]
    cfg = Case("shapes/defeat/faster_rcnn_tiny.yaml", opts).config()
    model = measuring.random_pair(cfg)
    with EventStorage():
        losses = model.student(measuring.random_batch(Load(size=64), model.family, cfg.MODEL))
    assert {"loss_mask", "loss_keypoint"} & losses.keys()
    assert all(loss.isfinite() for loss in losses.values())
