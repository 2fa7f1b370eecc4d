"""The teacher rebuilt for speed. It is frozen: any form of it will do that gives the same outputs,
and :func:`rebuild` proves that it does."""

import contextlib
import logging
import math
from collections import Counter
from typing import (
    Callable,
    Collection,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Tuple,
)

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from d2kd.errors import UserError, reason
from d2kd.views import (
    Dense,
    Family,
    Features,
    Proposals,
    Read,
    RegionSet,
    Stage,
    TeacherView,
    Tower,
)

from .teacher import Teacher, TeacherPass

logger = logging.getLogger(__name__)

# What rounding stays below, and a mistake does not. In float32, of the largest difference as a
# fraction of the largest output; in half precision, whose single outputs may differ by far more
# in a deep detector, of the differences' norm as a fraction of the outputs'.
EXACT, ROUGH = 1e-3, 0.3
_TINY = 1e-12

_SIZE = (128, 160)  # height and width of the image of noise, pixels
_BOXES = [[8.0, 8.0, 40.0, 72.0], [20.3, 30.7, 150.9, 120.2]]

Outputs = Dict[Read, List[Tensor]]


class Options(NamedTuple):
    """How a teacher is rebuilt, named as in ``DISTILL.TEACHER``."""

    precision: str = ""  # one of PRECISIONS; "" = as the student runs
    fold_norms: bool = True
    channels_last: bool = True
    compile: bool = False
    mixed: bool = False  # the student runs in mixed precision


def rebuild(teacher: Teacher, student: Family, reads: Iterable[Read], options: Options) -> str:
    """Rebuilds a teacher in place, and compares what is read of it with what it gave as loaded in
    float32, on an image of noise: in float32 what folding and the layout change, and then what is
    left of it in half precision or compiled.

    Args:
        teacher: with its weights, in which nothing is to be changed any more.
        student: whose batches it gets.
        reads: what the methods declared of the teacher.
        options: what to do.

    Returns:
        what was done and the largest difference, for the report on the pair; "" if nothing was.

    Raises:
        UserError: if the outputs differ by more than rounding.
    """
    reads = _comparable(reads, teacher.family)
    if not reads:
        return ""
    with _all_bits_of_float32():
        loaded = declared_outputs(teacher, student, reads)
    observed = [o.module for o in teacher.family.observed(reads)]
    done, found = [], []
    if options.fold_norms:
        count = fold_frozen_norms(teacher.detector, observed)
        done += [f"{count} norms folded"] if count else []
    if options.channels_last:
        teacher.detector.to(memory_format=torch.channels_last)
        done += ["channels last"]
    if done:
        found += [f"to {_worst_error(loaded, teacher, student, EXACT):.0e}"]
    if options.precision:
        teacher.precision_name = options.precision
        done += [options.precision]
    compiled = _compiled(teacher, student, reads, observed) if options.compile else []
    half = options.precision in ("float16", "bfloat16")
    if half or compiled or (done and not found):
        worst = _worst_error(loaded, teacher, student, ROUGH if half else EXACT)
        found += [f"in {options.precision or 'float32'} to {worst:.0e}"]
    if options.mixed and not options.precision:
        with torch.autocast(teacher.detector.device.type, torch.float16):
            found += [f"in float16 to {_worst_error(loaded, teacher, student, ROUGH):.0e}"]
    if not (done or compiled):
        return ""
    return f"{', '.join([*done, *compiled])}; outputs as of the file {', '.join(found)}"


@contextlib.contextmanager
def _all_bits_of_float32() -> Iterator[None]:
    """Inside of it, NVIDIA's convolutions and products do not round float32 to 10 bits (TF32),
    which would differ more between two ways to compute the same than a mistake does."""
    backends = torch.backends
    if hasattr(backends, "fp32_precision"):  # from torch 2.9 on: the two ways cannot be mixed
        name, exact = "fp32_precision", "ieee"
        parts = (backends.cudnn.conv, backends.cuda.matmul)
        parts += (backends.mkldnn.conv, backends.mkldnn.matmul)
    else:
        name, exact = "allow_tf32", False
        parts = (backends.cudnn, backends.cuda.matmul)
    before = [getattr(part, name) for part in parts]
    for part in parts:
        setattr(part, name, exact)
    try:
        yield
    finally:
        for part, value in zip(parts, before):
            setattr(part, name, value)


def declared_outputs(teacher: Teacher, student: Family, reads: Iterable[Read]) -> Outputs:
    """What is read of a teacher on an image of noise, always the same one; no random number of the
    run is drawn.

    Args:
        teacher: as it is now.
        student: whose batches it gets.
        reads: all but :class:`~d2kd.views.Proposals`, which are sampled.
    """
    noise = torch.Generator().manual_seed(0)
    shape = (len(student.pixels.mean), *_SIZE)
    image = torch.randint(256, shape, generator=noise, dtype=torch.uint8)
    inputs = [{"image": image}]
    teacher_pass = TeacherPass(teacher, inputs, reads)
    teacher_pass.run_backbone(student.preprocess(inputs).tensor)
    view = teacher_pass.finish([])
    regions = RegionSet([Boxes(torch.tensor(_BOXES)).to(teacher.detector.device)], [])
    return {read: _tensors(view, read, regions) for read in reads}


def _tensors(view: TeacherView, read: Read, regions: RegionSet) -> List[Tensor]:
    if isinstance(read, Features):
        return list(view.features.values())
    if isinstance(read, Stage):
        return [view.stage(read)]
    if isinstance(read, Dense):
        return [x for levels in view.predictions if levels for x in levels]
    if isinstance(read, Tower) and read.statistics:
        return [x for level in view.tower_statistics(read) for x in level]
    if isinstance(read, Tower):
        return view.tower(read)
    return [x for x in view.regions(regions, read) if x is not None]


def _comparable(reads: Iterable[Read], family: Family) -> FrozenSet[Read]:
    """Proposals are sampled at random: what they are made of stands for them."""
    kept = {read for read in reads if not isinstance(read, Proposals)}
    sampled = len(kept) < len(frozenset(reads)) and family.dense_head is not None
    return frozenset({*kept, Dense()} if sampled else kept)


def _worst_error(loaded: Outputs, teacher: Teacher, student: Family, tolerance: float) -> float:
    """How far a teacher's outputs are from those of the file, in the worst read.

    Args:
        loaded: those of the file.
        teacher: as it is now.
        student: whose batches it gets.
        tolerance: :data:`EXACT`, or :data:`ROUGH` for half precision.

    Raises:
        UserError: if they are farther than that.
    """
    measure = _relative_maximum if tolerance == EXACT else _relative_norm
    with _all_bits_of_float32():
        rebuilt = declared_outputs(teacher, student, loaded)
    errors = {x: _largest(measure, loaded[x], rebuilt[x]) for x in loaded}
    # A NaN is above every tolerance.
    read = max(errors, key=lambda x: math.inf if math.isnan(errors[x]) else errors[x])
    if errors[read] <= tolerance:
        return errors[read]
    if tolerance == EXACT:
        cause, other = "rebuilt for speed", "as loaded"
        remedy = "FOLD_NORMS, CHANNELS_LAST or COMPILE to False"
    else:
        cause, other = "in half precision", "in float32"
        remedy = "PRECISION to float32, and COMPILE to False if it is on"
    raise UserError(
        f"DISTILL.TEACHER: {cause}, the teacher gives other outputs than {other}: its {read} "
        f"differ by {errors[read]:.1g} of their value ({tolerance:g} can be rounding): set {remedy}"
    )


def _largest(
    measure: Callable[[Tensor, Tensor], Tensor], loaded: List[Tensor], rebuilt: List[Tensor]
) -> float:
    return torch.stack([measure(a, b) for a, b in zip(loaded, rebuilt)]).max().item()


def _relative_maximum(loaded: Tensor, rebuilt: Tensor) -> Tensor:
    return (loaded - rebuilt).abs().max() / (loaded.abs().max() + _TINY)


def _relative_norm(loaded: Tensor, rebuilt: Tensor) -> Tensor:
    return (loaded - rebuilt).float().norm() / (loaded.float().norm() + _TINY)


def fold_frozen_norms(detector: nn.Module, observed: Collection[nn.Module] = ()) -> int:
    """Merges norms with fixed statistics into the convolutions and linear layers before them: the
    ``norm`` of Detectron2's ``Conv2d``, and what follows a layer in a ``Sequential``. A layer that
    several norms follow, as in heads that have one per level, stays as it is.

    Args:
        detector: in eval mode; changed in place.
        observed: modules whose outputs somebody reads: these stay what they are.

    Returns:
        how many norms are gone.
    """
    pairs = list(_pairs(detector))
    followers = Counter(layer for layer, _, _, _ in pairs)
    users = Counter(norm for _, norm, _, _ in pairs)
    count = 0
    for layer, norm, owner, name in pairs:
        seen = norm if owner is layer else layer  # whose output is another one afterwards
        single = followers[layer] == users[norm] == 1
        if single and seen not in observed and _is_fixed(norm):
            _fold(layer, norm)
            setattr(owner, name, None if owner is layer else nn.Identity())
            count += 1
    return count


def _pairs(detector: nn.Module) -> Iterator[Tuple[nn.Module, nn.Module, nn.Module, str]]:
    """Every layer with the module after it, the owner of that one, and its name there."""
    for module in detector.modules():
        if isinstance(module, nn.Conv2d) and isinstance(getattr(module, "norm", None), nn.Module):
            yield module, module.norm, module, "norm"
        if isinstance(module, nn.Sequential):
            children = list(module.named_children())
            for (_, layer), (name, norm) in zip(children, children[1:]):
                plain = getattr(layer, "norm", None) is None
                plain = plain and getattr(layer, "activation", None) is None
                if isinstance(layer, (nn.Conv2d, nn.Linear)) and plain:
                    yield layer, norm, module, name


def _is_fixed(norm: nn.Module) -> bool:
    fixed = isinstance(norm, FrozenBatchNorm2d) or (
        isinstance(norm, _BatchNorm) and not norm.training
    )
    return fixed and norm.running_mean is not None


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)


def _compiled(
    teacher: Teacher, student: Family, reads: Iterable[Read], observed: List[nn.Module]
) -> List[str]:
    """Compiles the backbone and what the dense head is made of, and says what came of it."""
    head = teacher.family.dense_head
    parts = [teacher.family.backbone, *(head.largest_parts if head else [])]
    found = [m for part in parts for m in largest_unobserved(part, observed)]
    modules = [m for m in found if any(True for _ in m.children())]  # single layers gain nothing
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)
    try:
        declared_outputs(teacher, student, reads)
    except Exception as error:  # of the compiler, which has many
        for module in modules:
            del module.forward
        logger.warning(
            f"DISTILL.TEACHER.COMPILE is True, but torch cannot compile the teacher, which runs "
            f"without: {reason(error)}"
        )
        return []
    return ["compiled"]


def largest_unobserved(module: nn.Module, observed: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The largest parts of a module inside which nobody observes anything: a compiled part does not
    call the hooks of the modules that it is made of, only its own.

    Args:
        module: a part of a detector.
        observed: modules, or :class:`~d2kd.views.families.residual.ResidualSum`.
    """
    hooked = {m for o in observed for m in getattr(o, "hooked", [o])}
    if hooked.isdisjoint(m for m in module.modules() if m is not module):
        yield module
        return
    for child in module.children():
        yield from largest_unobserved(child, observed)
