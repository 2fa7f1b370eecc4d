"""From a run to a file: the program is made and compared with the student first, then written."""

import io
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import Tensor, nn

from d2kd.checkpoint.formats import CLASSES
from d2kd.engine.trained_run import TrainedRun
from d2kd.errors import UserError, reason
from d2kd.prediction import Predictor, images_at_hand
from d2kd.writing import atomic_write, refuse_existing

from . import contract, numpy_decoder, onnx_file, torchscript_file
from .detections import Detections, detect, output_names, traceable
from .half import halve
from .numpy_decoder import decode, pad
from .parity import FULL, HALF, Parity, check_parity
from .raw_heads import RawHeads, decoder_settings
from .trial_images import MAX_PHOTOGRAPHS, Size, trial_images

# By name: the ending of its file
FORMATS = {"onnx": ".onnx", "torchscript": ".ts", "weights": ".pth"}
_RUNS = Callable[[Tensor], Detections]


class ExportOptions(NamedTuple):
    """What is to be written."""

    format: str = "onnx"  # one of FORMATS
    raw_heads: bool = False
    half: bool = False
    fixed_size: Optional[Size] = None
    device: str = "cpu"  # on which a TorchScript program will run

    def check(self) -> None:
        """
        Raises:
            UserError: for options that do not go together.
        """
        only_onnx = {"--raw-heads": self.raw_heads, "--fixed-size": self.fixed_size is not None}
        for option, given in only_onnx.items():
            if given and self.format != "onnx":
                raise UserError(f"{option} is for --format onnx, not for {self.format}: leave it")
        if self.device != "cpu" and self.format != "torchscript":
            raise UserError(
                f"--device is {self.device}: a file of --format {self.format} runs anywhere; only "
                "torchscript is made for a device"
            )
        if self.fixed_size is not None and min(self.fixed_size) < 1:
            raise UserError(f"--fixed-size is {self.fixed_size}: give a height and a width")


class Exported(NamedTuple):
    """What was written."""

    paths: List[str]
    parity: Optional[Parity]  # None for bare weights
    seconds: float  # to make the program, without the comparison


class _Program(NamedTuple):
    """A program that is not written yet."""

    runs: _RUNS
    to_file: Callable[[Dict[str, Any]], bytes]  # takes the metadata
    metadata: Dict[str, Any]


def export_student(
    run: TrainedRun, path: str, options: ExportOptions, images: Sequence[str] = ()
) -> Exported:
    """
    Args:
        run: whose student it is.
        path: the file to write; must not exist.
        options: what to write.
        images: files of photographs to compare program and student on; those at hand if there are
            none.

    Raises:
        UserError: if there is such a file, the student cannot be written in this format, or the
            program does not find what the student finds.
    """
    options.check()
    decoder = f"{os.path.splitext(path)[0]}_decoder.py" if options.raw_heads else ""
    for file in filter(None, (path, decoder)):
        refuse_existing(file, "--output")
    if options.format == "onnx":
        onnx_file.require_onnx()
    cfg, student = run.student_config(), run.student(options.device).requires_grad_(False)
    if options.format == "weights":
        start = time.perf_counter()
        content = _weights(student, run.classes, options.half)
        return _written({path: content}, None, time.perf_counter() - start)

    _refuse_unknown_heads(student, options.format)
    photographs = images or images_at_hand(_with_data(run), MAX_PHOTOGRAPHS)
    trials = trial_images(Predictor(student, cfg), photographs, options.fixed_size)
    expected = [detect(student, image) for image in trials]
    if options.half:
        halve(student)
    start = time.perf_counter()
    program = _make(student, options, trials[0])
    seconds = time.perf_counter() - start
    parity = check_parity(
        expected,
        [_tried(program.runs, image) for image in trials],
        [tuple(image.shape[-2:]) for image in trials],
        HALF if options.half else FULL,
    )
    metadata = {
        **contract.input_contract(student, cfg, run.classes),
        "precision": "float16" if options.half else "float32",
        **program.metadata,
        "parity": parity._asdict(),
    }
    files = {path: program.to_file(metadata)}
    if decoder:
        files[decoder] = Path(numpy_decoder.__file__).read_bytes()
    return _written(files, parity, seconds)


def _with_data(run: TrainedRun) -> CfgNode:
    """The config that knows the run's data sets, if it was not left behind."""
    return run.config() if run.has_config() else run.student_config()


def _refuse_unknown_heads(student: nn.Module, format: str) -> None:
    heads = getattr(student, "roi_heads", None)
    if getattr(heads, "keypoint_on", False):
        raise UserError(
            f"the student predicts keypoints, which --format {format} cannot hold: take --format "
            "weights"
        )
    if isinstance(heads, CascadeROIHeads) and format == "torchscript":
        raise UserError(
            "the student is a Cascade R-CNN, between whose box heads Detectron2 calls a Python "
            "function that --format torchscript cannot hold: take --format onnx or weights"
        )


def _weights(student: nn.Module, classes: Sequence[str], half: bool) -> bytes:
    """A checkpoint without optimizer, adapters and counters. Detectron2 reads numbers of 16 bits
    into 32 again."""
    model = student.state_dict()
    if half:
        model = {k: v.half() if v.is_floating_point() else v for k, v in model.items()}
    buffer = io.BytesIO()
    torch.save({"model": model, **({CLASSES: list(classes)} if classes else {})}, buffer)
    return buffer.getvalue()


def _make(student: nn.Module, options: ExportOptions, image: Tensor) -> _Program:
    if options.format == "torchscript":
        return _torchscript(student, image)
    if options.raw_heads:
        return _raw_heads(student, options.fixed_size, image)
    return _onnx(student, options.fixed_size, image)


def _torchscript(student: nn.Module, image: Tensor) -> _Program:
    names, device = output_names(student), next(student.parameters()).device
    program = torchscript_file.trace(traceable(student, image.to(device)))
    run = torchscript_file.runner(torchscript_file.to_bytes(program, {}), names, device)
    return _Program(
        runs=lambda image: Detections(**run(image)),
        to_file=lambda metadata: torchscript_file.to_bytes(program, metadata),
        metadata={
            **contract.image_of_any_size(),
            "outputs": contract.outputs(names),
            "device": str(device),
        },
    )


def _onnx(student: nn.Module, fixed_size: Optional[Size], image: Tensor) -> _Program:
    names = output_names(student)
    axes = {name: {0: "detections"} for name in names}
    if fixed_size:
        described = contract.image_of_fixed_size(*fixed_size)
    else:
        described = contract.image_of_any_size()
        axes["image"] = {1: "height", 2: "width"}
    model = onnx_file.to_onnx(traceable(student, image), {"image": image}, names, axes)
    run = onnx_file.runner(model)
    return _Program(
        runs=lambda image: Detections(**run(image)),
        to_file=lambda metadata: onnx_file.with_metadata(model, contract.as_text(metadata)),
        metadata={**described, "outputs": contract.outputs(names)},
    )


def _raw_heads(student: nn.Module, fixed_size: Optional[Size], image: Tensor) -> _Program:
    raw = RawHeads(student).eval()
    settings = decoder_settings(raw)
    divisor = settings["size_divisibility"]
    if fixed_size and any(side % divisor for side in fixed_size):
        raise UserError(
            f"--fixed-size is {fixed_size.height} {fixed_size.width}: bare heads take multiples of "
            f"{divisor}"
        )
    sizes = {} if fixed_size else {2: "height", 3: "width"}
    axes = {name: {0: "batch", **sizes} for name in raw.output_names}
    axes["images"] = {0: "batch", **sizes}
    batch = _padded(image, settings)
    model = onnx_file.to_onnx(raw, {"images": batch}, raw.output_names, axes)
    run = onnx_file.runner(model)

    def runs(image: Tensor) -> Detections:
        outputs = run(_padded(image, settings))
        return Detections(*decode(outputs, settings, _size(image)))

    return _Program(
        runs=runs,
        to_file=lambda metadata: onnx_file.with_metadata(model, contract.as_text(metadata)),
        metadata={**contract.batch(divisor), "decoder": settings},
    )


def _padded(image: Tensor, settings: Dict[str, Any]) -> Tensor:
    """(C, H, W) -> (1, C, H', W')."""
    return torch.from_numpy(pad(image.numpy(), settings))[None]


def _size(image: Tensor) -> Tuple[int, int]:
    height, width = image.shape[-2:]
    return height, width


def _tried(runs: _RUNS, image: Tensor) -> Detections:
    try:
        return runs(image)
    except Exception as error:  # whatever a runtime says
        height, width = _size(image)
        raise UserError(
            f"the exported program fails on an image of {height} x {width}, nothing is written: "
            f"{reason(error)}"
        ) from error


def _written(files: Dict[str, bytes], parity: Optional[Parity], seconds: float) -> Exported:
    for path, content in files.items():
        with atomic_write(path, "wb") as f:
            f.write(content)
    return Exported(list(files), parity, seconds)
