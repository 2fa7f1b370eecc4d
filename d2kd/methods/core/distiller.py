"""What a distillation method is: a registry, what a method declares, and its base class."""

from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
)

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from d2kd.errors import UserError
from d2kd.layers import RandomStream
from d2kd.schema import Keys, check_node, config_node, get_value, set_value
from d2kd.views import Family, Reads, StudentView, TeacherView

from .registry import DistillerRegistry

DISTILLER_REGISTRY = DistillerRegistry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Registry of distillation methods, by class name (the name used in ``DISTILL.METHODS``).

A registered class is a :class:`Distiller`. It is built as ``cls(node, student, teacher)`` with its
config node ``DISTILL.<NAME>`` and two :class:`~d2kd.views.Family` objects, and called once per
training step as ``distiller(student, teacher, targets)`` with two views and the ground truth of the
batch (a list of Instances). It returns a dict from the name of each term to a tensor: either one
value per FPN level, of shape (L,), or a scalar. Weights and schedules are applied by the caller.
"""

# Computes scalars to log about one term, by name
Diagnostics = Callable[[], Dict[str, Tensor]]


class Terms(Dict[str, Tensor]):
    """What a distiller returns if it has more to say than its losses.

    Attributes:
        diagnostics: by term; called, if at all, before the backward pass.
    """

    def __init__(self, values: Mapping[str, Tensor], diagnostics: Mapping[str, Diagnostics]):
        super().__init__(values)
        self.diagnostics = diagnostics


def loss_name(method: str, term: str) -> str:
    """What a term's weighted loss is called among the losses of a step, and in the logs."""
    return f"loss_{method}_{term}".lower()


def scalar_name(method: str, term: str, what: str) -> str:
    """What another number about a term is called in the logs."""
    return f"distill/{method}_{term}/{what}".lower()


class Defaults(NamedTuple):
    """What a method's keys default to for one kind of student.

    Attributes:
        values: by the key's place below the method's node, such as ``"CLS.WEIGHT"``.
        source: where they come from, for the report on the pair.
    """

    values: Dict[str, Any]
    source: str


class Distiller(nn.Module):
    """One method: its adapters, and the loss terms that it computes from two views.

    A subclass declares its config keys in :attr:`keys`, what its terms read in :meth:`reads`, and
    implements ``from_config(cls, node, student, teacher) -> dict`` (Detectron2's ``@configurable``
    idiom) and :meth:`forward`. It builds parameters only for :attr:`terms`, computes only what
    :meth:`wants` tells, and never sees weights.

    Attributes:
        keys: of the node ``DISTILL.<NAME>``: for every term, under its name in capitals, what
            :func:`~d2kd.methods.core.schedule.term` gives, and the method's own knobs.
        defaults_of: what keys default to instead, by the student's ``MODEL.META_ARCHITECTURE``.
        caveat: what one should know who quotes numbers of the method, for the log and the report.
        terms: the terms of this run, those whose weight is not 0.
        num_levels: how many FPN levels the per-level terms have; 0 if there are none. Override
            :meth:`levels_of` if only some terms are per level.
        random: inside of it, :meth:`forward` draws its random numbers.
    """

    keys: Keys = {}
    defaults_of: Mapping[str, Defaults] = {}
    caveat = ""

    def __init__(self, terms: Iterable[str], num_levels: int = 0):
        super().__init__()
        self.terms: FrozenSet[str] = frozenset(terms)
        self.num_levels = num_levels
        self.random = RandomStream()
        self._wanted = self.terms

    @classmethod
    def node_name(cls) -> str:
        """Where the method's node stands in a config."""
        return f"DISTILL.{cls.__name__.upper()}"

    @classmethod
    def term_key(cls, term: str, key: str = "WEIGHT") -> str:
        """The full name of a term's config key."""
        return f"{cls.node_name()}.{term.upper()}.{key}"

    @classmethod
    def node_of(cls, cfg: CfgNode) -> CfgNode:
        """The method's node in the config of a run."""
        return cfg.DISTILL[cls.__name__.upper()]

    @classmethod
    def default_config(cls) -> CfgNode:
        """The node ``DISTILL.<NAME>``."""
        return config_node(cls.keys)

    @classmethod
    def check_config(cls, node: CfgNode) -> None:
        """
        Raises:
            UserError: naming the values that are not what their keys may be.
        """
        check_node(node, cls.keys, cls.node_name())
        for term in cls.all_terms():
            start, stop = node[term.upper()].START_ITER, node[term.upper()].STOP_ITER
            if 0 < stop <= start:
                raise UserError(
                    f"{cls.term_key(term, 'STOP_ITER')} is {stop}, but START_ITER is {start}: the "
                    "term would never run; give more, or 0 for no end"
                )

    @classmethod
    def defaults_for(cls, architecture: str) -> Optional[Defaults]:
        """What keys default to for a kind of student: its own values, or those of the nearest class
        that it is derived from; None if there are none."""
        if architecture not in META_ARCH_REGISTRY:  # which building the detector refuses
            return cls.defaults_of.get(architecture)
        kind = META_ARCH_REGISTRY.get(architecture)
        names = (base.__name__ for base in getattr(kind, "__mro__", (kind,)))
        return next((cls.defaults_of[name] for name in names if name in cls.defaults_of), None)

    @classmethod
    def use_defaults_of(cls, node: CfgNode, architecture: str) -> None:
        """Sets what defaults to something else for a kind of student.

        Args:
            node: ``DISTILL.<NAME>``, changed in place.
            architecture: the student's ``MODEL.META_ARCHITECTURE``.
        """
        defaults = cls.defaults_for(architecture)
        if defaults is None:
            return
        general = cls.default_config()
        for key, value in defaults.values.items():
            if get_value(node, key) == get_value(general, key):  # nobody has set it yet
                set_value(node, key, value)

    @classmethod
    def source_of_values(cls, node: CfgNode, architecture: str) -> str:
        """Where the weights of terms, and what else differs by kind of student, come from; "" if
        nothing differs."""
        if not cls.defaults_of:
            return ""
        defaults = cls.defaults_for(architecture)
        if defaults is None:
            known = ", ".join(cls.defaults_of)
            return f"nobody's for {architecture}, search your own (there are some for {known})"
        general = cls.default_config()
        weights = [f"{term.upper()}.WEIGHT" for term in cls.all_terms()]
        expected = {**{key: get_value(general, key) for key in weights}, **defaults.values}
        same = all(get_value(node, key) == value for key, value in expected.items())
        return defaults.source if same else f"as the config says, not {defaults.source}"

    @classmethod
    def all_terms(cls) -> Tuple[str, ...]:
        """The names of all terms, enabled or not."""
        return tuple(
            name.lower()
            for name, key in cls.keys.items()
            if isinstance(key, Mapping) and "WEIGHT" in key
        )

    @classmethod
    def enabled_terms(cls, node: CfgNode) -> Tuple[str, ...]:
        """The terms whose ``WEIGHT`` is not 0."""
        return tuple(t for t in cls.all_terms() if node[t.upper()].WEIGHT != 0)

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        """What each enabled term reads of the two detectors. Asked once, when these stand but hold
        no weights yet.

        Args:
            node: ``DISTILL.<NAME>``.
            student, teacher: the two detectors.

        Raises:
            UserError: if the method cannot say what to read of these two.
        """
        raise NotImplementedError(f"{cls.__name__} must declare what it reads")

    @classmethod
    def check_pair(cls, node: CfgNode, student: Family, teacher: Family) -> None:
        """Asked once after :meth:`reads`, when the two detectors hold no weights yet.

        Raises:
            UserError: if they do not fit each other in what the method compares.
        """

    def initialize_student(self, student: Family, teacher: Family) -> List[str]:
        """Fills weights of the student before training, where a method does that.

        Returns:
            what was filled, for the report on the pair.
        """
        return []

    def no_weight_decay(self) -> Set[str]:
        """Names of parameters that ``SOLVER.WEIGHT_DECAY`` does not pull towards 0."""
        return set()

    def levels_of(self, term: str) -> int:
        """How many values ``forward`` returns for a term, one per FPN level; 0 for a scalar."""
        return self.num_levels

    def want(self, terms: Iterable[str]) -> None:
        """Says which terms the next call of ``forward`` has to return; all of them at first."""
        self._wanted = self.terms.intersection(terms)

    def wants(self, term: str) -> bool:
        """Whether ``forward`` has to compute this term in the current step."""
        return term in self._wanted

    def maps(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Dict[str, Tensor]]:
        """What the method looks at, for people to see; arguments as for :meth:`forward`.

        Returns:
            by name, such as "score", and by the name of the student's FPN level or backbone stage,
            maps (N, h, w) of values from 0 to 1, as large as these; empty for a method that weighs
            no place more than another.
        """
        return {}

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Tensor]:
        """
        Args:
            student, teacher: the two detectors on the batch.
            targets: ground truth per image, on the student's device.

        Returns:
            the value of every wanted term: (L,), one per FPN level, or a scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must define its losses")
