"""Programs of detectors: traced once, they take images of any size and any number of objects."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from made_up_run import CLASSES, KINDS, made_up_run, with_threshold
from toys import detector

from d2kd.cli.main import main
from d2kd.errors import UserError
from d2kd.export import ExportOptions, export_student, exporting, onnx_file, torchscript_file
from d2kd.export.detections import Detections, detect, output_names, traceable
from d2kd.export.half import halve
from d2kd.export.parity import FULL, HALF, Tolerance, check_parity
from d2kd.export.trial_images import Size

pytestmark = pytest.mark.docs  # beside the documentation and the browser: they take their time

# More places than candidates per level, and fewer
SIZES = ((128, 160), (96, 64), (20, 33))


def compare(student, runs, tolerance=FULL):
    torch.manual_seed(0)
    images = [torch.rand(3, *size) * 255 for size in SIZES]
    expected = [detect(student, image) for image in images]
    return check_parity(expected, [Detections(**runs(x)) for x in images], SIZES, tolerance)


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "PaperFCOS", "ATSS", "MaskRCNN"])
def test_a_traced_program_takes_other_sizes(kind):
    name = KINDS.get(kind, "shapes/baselines/mask_rcnn_tiny.yaml")
    node = "FasterRCNN" if kind == "MaskRCNN" else kind
    student = detector(name, with_threshold(node, 0.012)).eval().requires_grad_(False)
    program = torchscript_file.trace(traceable(student, torch.rand(3, *SIZES[1]) * 255))
    file = torchscript_file.to_bytes(program, {})
    runs = torchscript_file.runner(file, output_names(student), torch.device("cpu"))
    parity = compare(student, runs)
    assert parity.detections > 20 and parity.unmatched == 0


# With this threshold GFL has levels without candidates, and finds nothing in an image of one colour
@pytest.mark.parametrize("kind, threshold", [("GFL", 0.015), ("FasterRCNN", 0.012)])
def test_an_onnx_program(kind, threshold, tmp_path):
    run = made_up_run(tmp_path / "run", kind, threshold=threshold)
    path = tmp_path / "student.onnx"
    exported = export_student(run, str(path), ExportOptions())
    assert exported.parity.detections > 0 and exported.parity.box_error < 1e-3

    runs = onnx_file.runner(path.read_bytes())
    student = run.student("cpu")
    assert compare(student, runs).detections > 0
    in_grey = runs(torch.full((3, 40, 50), 103.0))
    assert in_grey["boxes"].shape == (len(in_grey["scores"]), 4)
    assert (len(in_grey["scores"]) == 0) == (kind == "GFL")

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert metadata["input_format"] == "BGR" and metadata["min_size"] == "96"
    assert json.loads(metadata["parity"])["detections"] == exported.parity.detections


def test_raw_heads_have_their_decoder_beside_them(tmp_path):
    run = made_up_run(tmp_path / "run", "FCOS")
    options = ExportOptions(raw_heads=True, half=True, fixed_size=Size(64, 96))
    exported = export_student(run, str(tmp_path / "heads.onnx"), options)
    assert exported.paths == [str(tmp_path / "heads.onnx"), str(tmp_path / "heads_decoder.py")]
    assert "import d2kd" not in (tmp_path / "heads_decoder.py").read_text()
    size = (tmp_path / "heads.onnx").stat().st_size
    full = sum(p.numel() * 4 for p in run.student("cpu").parameters())
    assert size < 0.7 * full
    with pytest.raises(UserError, match="multiples of 32"):
        options = options._replace(fixed_size=Size(65, 96))
        export_student(run, str(tmp_path / "other.onnx"), options)


def test_the_command_writes_beside_the_run_and_once(fcos, capsys):
    main(["export", fcos.folder, "--format", "weights"])
    assert f"{fcos.folder}/student.pth: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", fcos.folder, "--format", "weights"])
    assert "student.pth exists: remove it, or give another --output" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ATSS", "FasterRCNN"])
def test_half_precision_keeps_boxes_in_float32(kind):
    student = detector(KINDS[kind], with_threshold(kind, 0.012)).eval().requires_grad_(False)
    image = torch.rand(3, 64, 96) * 255
    expected = detect(student, image)
    halve(student)
    assert student.backbone.fpn_lateral3.weight.dtype == torch.float16
    found = detect(student, image)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert check_parity([expected], [found], [(64, 96)], HALF).box_error > 0


def test_bare_weights_are_read_by_detectron2_and_keep_the_classes(tmp_path):
    run = made_up_run(tmp_path / "run", "RetinaNet")
    for half in (False, True):
        path = tmp_path / f"{half}.pth"
        options = ExportOptions(format="weights", half=half)
        assert export_student(run, str(path), options).parity is None
        content = torch.load(path, weights_only=True)
        assert content["classes"] == list(CLASSES) and set(content) == {"model", "classes"}
        state = run.student("cpu").state_dict()
        assert content["model"].keys() == state.keys()
        for name, value in state.items():
            assert torch.allclose(
                content["model"][name].to(value.dtype), value, rtol=1e-3, atol=1e-6
            )


@pytest.fixture(scope="module")
def fcos(tmp_path_factory):
    return made_up_run(tmp_path_factory.mktemp("fcos") / "run", "FCOS")


def test_nothing_is_written_that_differs(fcos, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "FULL", Tolerance(-1.0, -1.0, 0.0))
    with pytest.raises(UserError, match="is not the detector, nothing is written"):
        export_student(fcos, str(tmp_path / "student.ts"), ExportOptions(format="torchscript"))
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(fcos, tmp_path):
    path = tmp_path / "student.onnx"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists: remove it"):
        export_student(fcos, str(path), ExportOptions())
    assert path.read_text() == "mine"


def test_without_onnx_it_says_what_to_install(fcos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'd2kd\[export\]'"):
        export_student(fcos, str(tmp_path / "student.onnx"), ExportOptions())


@pytest.mark.parametrize(
    "options, message",
    [
        (ExportOptions(format="weights", raw_heads=True), "--raw-heads is for --format onnx"),
        (ExportOptions(format="torchscript", fixed_size=Size(64, 64)), "--fixed-size is for"),
        (ExportOptions(device="cuda"), "only torchscript is made for a device"),
        (ExportOptions(fixed_size=Size(0, 64)), "give a height and a width"),
    ],
)
def test_options_that_do_not_go_together(fcos, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export_student(fcos, str(tmp_path / "student"), options)


CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
CASCADE += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
KEYPOINTS = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)]


@pytest.mark.parametrize(
    "heads, format, message",
    [
        (CASCADE, "torchscript", "Cascade R-CNN, .* take --format onnx or weights"),
        (KEYPOINTS, "torchscript", "keypoints, .* torchscript cannot hold: take --format weights"),
        (KEYPOINTS, "onnx", "keypoints, which --format onnx cannot hold: take --format weights"),
    ],
)
def test_students_that_a_format_cannot_hold(tmp_path, heads, format, message):
    run = made_up_run(tmp_path / "run", "FasterRCNN", heads)
    with pytest.raises(UserError, match=message):
        export_student(run, str(tmp_path / "student"), ExportOptions(format=format))
    assert export_student(run, str(tmp_path / "student"), ExportOptions(format="weights")).paths


def test_a_cascade_goes_into_onnx(tmp_path):
    run = made_up_run(tmp_path / "run", "FasterRCNN", CASCADE)
    exported = export_student(run, str(tmp_path / "student.onnx"), ExportOptions())
    assert exported.parity.detections > 20 and exported.parity.box_error < 1e-3
