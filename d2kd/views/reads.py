"""What a loss term reads of a detector, as values: declared once by a method, answered by families.

From the same declaration follow the modules that are observed, how far the teacher runs, and what
the report on a pair prints.
"""

from dataclasses import dataclass, field
from typing import Mapping, Tuple, Type


class Read:
    """Base of everything that can be read of a detector on a batch. ``str`` names it for people."""


@dataclass(frozen=True)
class Features(Read):
    """The FPN levels."""

    def __str__(self) -> str:
        return "features"


@dataclass(frozen=True)
class Stage(Read):
    """A backbone stage.

    Attributes:
        name: "res2" ... "res5".
        pre_activation: before the activation that ends it.
    """

    name: str
    pre_activation: bool = False

    def __str__(self) -> str:
        return f"{self.name} before its activation" if self.pre_activation else self.name


@dataclass(frozen=True)
class Dense(Read):
    """The raw predictions of the dense head; of a two-stage detector, of its RPN.

    Attributes:
        outputs: which of "logits", "deltas" and "centerness"; not every head has the last. Branches
            that no output needs are not run in the teacher.
    """

    outputs: Tuple[str, ...] = ("logits", "deltas")

    def __str__(self) -> str:
        return "dense predictions" if self == Dense() else f"dense {' and '.join(self.outputs)}"


@dataclass(frozen=True)
class Tower(Read):
    """What a branch of the dense head holds after some of its blocks.

    Attributes:
        branch: "cls" or "bbox".
        depth: how many blocks have run; 0 stands for the FPN levels themselves.
        pre_activation: before the activation of the last of these blocks.
        statistics: mean and standard deviation of the channels alone. The maps are then not kept.
    """

    branch: str
    depth: int
    pre_activation: bool = False
    statistics: bool = False

    def __str__(self) -> str:
        before = " before its activation" if self.pre_activation else ""
        what = "statistics of " if self.statistics else ""
        return f"{what}{self.branch} tower at depth {self.depth}{before}"


@dataclass(frozen=True)
class Assignment(Read):
    """What the anchors of a dense detector learn from the ground truth."""

    def __str__(self) -> str:
        return "assignment"


@dataclass(frozen=True)
class Proposals(Read):
    """The sampled, labelled proposals of a two-stage detector.

    Attributes:
        stage: which box head of a cascade they are for, from 0.
    """

    stage: int = 0

    def __str__(self) -> str:
        return f"proposals of stage {self.stage}" if self.stage else "proposals"


@dataclass(frozen=True)
class Regions(Read):
    """What a two-stage detector makes of given boxes. The box head runs no further than asked.

    Attributes:
        pooled: RoI features.
        hidden: the box head's output.
        predictions: class logits and box deltas.
        pre_activation: what the last layer of the box head gives before its activation.
        stage: which box head of a cascade, from 0.
    """

    pooled: bool = False
    hidden: bool = False
    predictions: bool = False
    pre_activation: bool = False
    stage: int = 0

    @property
    def runs_head(self) -> bool:
        """Whether more is asked than RoI features."""
        return self.hidden or self.predictions or self.pre_activation

    def __str__(self) -> str:
        names = {
            "RoI features": self.pooled,
            "hidden vectors": self.hidden,
            "hidden vectors before their activation": self.pre_activation,
            "box predictions": self.predictions,
        }
        where = f" of stage {self.stage}" if self.stage else ""
        return ", ".join(name for name, asked in names.items() if asked) + where


@dataclass(frozen=True)
class Reads:
    """What one loss term reads.

    Attributes:
        student, teacher: of each.
        knobs: by kind of read, the method's config key, below its node, that decides which tower,
            stage and so on it is; messages about a detector that cannot give it blame this key.
            Without one they blame the term's ``WEIGHT`` alone.
        any_classes: the term makes sense with a teacher of other classes, although it reads
            predictions of the teacher.
    """

    student: Tuple[Read, ...] = ()
    teacher: Tuple[Read, ...] = ()
    knobs: Mapping[Type[Read], str] = field(default_factory=dict)
    any_classes: bool = False

    @property
    def compares_classes(self) -> bool:
        """Whether the term makes sense only if class i is the same one in student and teacher."""
        return not self.any_classes and any(
            isinstance(read, Dense) or (isinstance(read, Regions) and read.predictions)
            for read in self.teacher
        )


class CannotRead(Exception):
    """A detector cannot give what is to be read. The message says why, for people."""
