"""What a distillation method is: a registry, what a method declares, and its base class."""

from typing import Dict, FrozenSet, Iterable, List, NamedTuple, Tuple

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Registry of distillation methods, by class name (the name used in ``DISTILL.METHODS``).

A registered class is a :class:`Distiller`. It is built as ``cls(cfg, student, teacher)`` with the
two :class:`~d2kd.modeling.families.Family` objects, and called once per training step as
``distiller(student, teacher, targets)`` with two views and the ground truth of the batch (a list
of Instances). It returns a dict from the name of each term to a tensor: either one value per FPN
level, of shape (L,), or a scalar. Weights and schedules are applied by the caller.
"""


class Needs(NamedTuple):
    """What one loss term reads, by the names in ``Family.offers``."""

    student: Tuple[str, ...] = ()
    teacher: Tuple[str, ...] = ()


class Distiller(nn.Module):
    """One method: its adapters, and the loss terms that it computes from two views.

    A subclass sets :attr:`requires`, adds its config keys in :meth:`default_config`, and
    implements ``from_config(cls, cfg, student, teacher) -> dict`` (Detectron2's ``@configurable``
    idiom) and ``forward(student, teacher, targets) -> {term: tensor}``. It builds parameters only
    for :attr:`terms`, computes only what :meth:`wants` tells, and never sees weights.

    Attributes:
        requires: per term, what it reads of the student and of the teacher. Checked when the
            model is built.
        terms: the terms of this run, those whose weight is not 0.
        num_levels: how many FPN levels the per-level terms have; 0 if there are none. Override
            :meth:`levels_of` if only some terms are per level.
    """

    requires: Dict[str, Needs] = {}

    def __init__(self, terms: Iterable[str], num_levels: int = 0):
        super().__init__()
        self.terms: FrozenSet[str] = frozenset(terms)
        self.num_levels = num_levels
        self._active = self.terms

    @classmethod
    def default_config(cls) -> CfgNode:
        """The node ``DISTILL.<NAME>``: one :func:`~d2kd.methods.schedule.term_config` per term
        under the term's name in capitals, then the method's own knobs."""
        raise NotImplementedError(f"{cls.__name__} must define its config node")

    @classmethod
    def node(cls, cfg: CfgNode) -> CfgNode:
        """This method's config node, ``cfg.DISTILL.<NAME>``."""
        return cfg.DISTILL[cls.__name__.upper()]

    @classmethod
    def enabled_terms(cls, cfg: CfgNode) -> Tuple[str, ...]:
        """The terms whose ``WEIGHT`` is not 0."""
        return tuple(t for t in cls.requires if cls.node(cfg)[t.upper()].WEIGHT != 0)

    def undecayed(self) -> List[nn.Parameter]:
        """Parameters that ``SOLVER.WEIGHT_DECAY`` does not pull towards 0."""
        return []

    def levels_of(self, term: str) -> int:
        """How many values ``forward`` returns for a term, one per FPN level; 0 for a scalar."""
        return self.num_levels

    def activate(self, terms: Iterable[str]) -> None:
        """Says which terms the next call of ``forward`` has to return."""
        self._active = self.terms.intersection(terms)

    def wants(self, term: str) -> bool:
        """Whether ``forward`` has to compute this term in the current step."""
        return term in self._active

    def forward(self, student, teacher, targets) -> Dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define its losses")
