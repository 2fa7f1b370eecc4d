"""Writing ONNX with torch's exporter by tracing, and running it with onnxruntime.

torch's newer exporter (``dynamo=True``) does not get through Detectron2's padding of images to
sizes that are known at run time only.
"""

import importlib
import io
import warnings
from types import ModuleType
from typing import Callable, Dict, Mapping, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from d2kd.errors import UserError, reason

# The oldest with all operations that detectors need
OPSET = 17
# By name of an input or output: its axes of a size not known before, and how they are called
Axes = Mapping[str, Mapping[int, str]]


def require_onnx() -> None:
    """
    Raises:
        UserError: if onnx or onnxruntime is not installed.
    """
    _library("onnx")
    _library("onnxruntime")


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"ONNX needs {name}, which is not installed: pip install 'd2kd[export]'"
        ) from error


def to_onnx(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], axes: Axes
) -> bytes:
    """
    Args:
        module: takes the inputs in order, returns tensors.
        inputs: examples by name.
        outputs: names.
        axes: those of which the size may change.

    Raises:
        UserError: if torch cannot express the module in ONNX.
    """
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what tracing says of each branch in Detectron2
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                buffer,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: dict(names) for name, names in axes.items()},
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # one of many kinds, by the operation that is missing
        raise UserError(f"the student cannot be written as ONNX: {reason(error)}") from error
    return buffer.getvalue()


def with_metadata(model: bytes, metadata: Mapping[str, str]) -> bytes:
    """A model with texts by name, which ``get_modelmeta().custom_metadata_map`` reads."""
    onnx = _library("onnx")
    proto = onnx.load_model_from_string(model)
    proto.producer_name = "d2kd"
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def runner(model: bytes) -> Callable[[Tensor], Dict[str, np.ndarray]]:
    """A function that runs a model of one input on the CPU, and returns its outputs by name.

    Raises:
        UserError: if onnxruntime does not take the model.
    """
    onnxruntime = _library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, too
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"onnxruntime refuses the exported program: {reason(error)}") from error
    (name,) = (x.name for x in session.get_inputs())
    outputs: Tuple[str, ...] = tuple(x.name for x in session.get_outputs())
    return lambda tensor: dict(zip(outputs, session.run(None, {name: tensor.numpy()})))
