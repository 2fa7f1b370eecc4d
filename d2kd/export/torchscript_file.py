"""Writing TorchScript by tracing."""

import io
import json
import warnings
from typing import Any, Callable, Dict, Mapping, Sequence

import numpy as np
import torch
from detectron2.export import TracingAdapter
from torch import Tensor

from d2kd.errors import UserError, reason

# Name of the metadata in a file; torch.jit.load(path, _extra_files={METADATA: ""}) reads it
METADATA = "metadata.json"


def trace(module: TracingAdapter) -> torch.jit.ScriptModule:
    """The program of a module, for images of any size, on the device that the module is on."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what tracing says of each branch in Detectron2
        return torch.jit.trace(module, module.flattened_inputs, check_trace=False)


def to_bytes(program: torch.jit.ScriptModule, metadata: Mapping[str, Any]) -> bytes:
    """A program as its file, with its metadata as JSON in it.

    Raises:
        UserError: if it has an operation that only Python knows.
    """
    buffer = io.BytesIO()
    try:
        torch.jit.save(program, buffer, _extra_files={METADATA: json.dumps(metadata, indent=1)})
    except RuntimeError as error:
        raise UserError(
            f"the student cannot be written as TorchScript: {reason(error)}; take --format onnx"
        ) from error
    return buffer.getvalue()


def runner(
    file: bytes, outputs: Sequence[str], device: torch.device
) -> Callable[[Tensor], Dict[str, np.ndarray]]:
    """A function that runs the program in a file, and returns its outputs by name."""
    program = torch.jit.load(io.BytesIO(file), map_location=device)

    @torch.no_grad()
    def run(image: Tensor) -> Dict[str, np.ndarray]:
        return dict(zip(outputs, (x.cpu().numpy() for x in program(image.to(device)))))

    return run
