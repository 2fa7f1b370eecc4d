"""What checks find in data sets: values, which can be counted and shown."""

from collections import defaultdict
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

ERROR, WARNING = "error", "warning"


class Finding(NamedTuple):
    """Something wrong with an image, an annotation or a whole file."""

    kind: str  # the same words for all findings that are alike
    severity: str  # ERROR: training or evaluation would fail, or go wrong in silence; or WARNING
    file: str  # which is to be corrected
    message: str  # what was found there, and what to do
    image: Optional[Any] = None  # its id
    annotation: Optional[Any] = None  # its id

    def __str__(self) -> str:
        places = (("annotation", self.annotation), ("image", self.image))
        where = " of ".join(f"{name} {id}" for name, id in places if id is not None)
        return ": ".join(filter(None, [self.file, where, self.message]))


def on_annotation(
    kind: str, severity: str, path: str, text: str, annotation: Mapping[str, Any]
) -> Finding:
    """A finding with the ids of an annotation and of its image."""
    return Finding(kind, severity, path, text, annotation.get("image_id"), annotation.get("id"))


def count(findings: Sequence[Finding], severity: str) -> int:
    """How many findings have a severity."""
    return sum(finding.severity == severity for finding in findings)


def by_kind(findings: Sequence[Finding]) -> List[List[Finding]]:
    """Findings that are alike, together: errors before warnings, the most frequent first."""
    groups: Dict[Tuple[str, str], List[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.kind].append(finding)
    return sorted(groups.values(), key=lambda group: (group[0].severity != ERROR, -len(group)))


def summary(findings: Sequence[Finding], examples: int = 3) -> List[str]:
    """
    Args:
        findings: any number.
        examples: to show of each kind.

    Returns:
        lines: each kind with its count, below it some of its findings; one line for what there is
        once.
    """
    lines = []
    for group in by_kind(findings):
        first = group[0]
        if len(group) == 1:
            lines.append(f"{first.severity}: {first.kind}: {first}")
            continue
        lines.append(f"{first.severity}: {first.kind} ({len(group)})")
        lines += [f"  {finding}" for finding in group[:examples]]
        if len(group) > examples:
            lines.append(f"  and {len(group) - examples} more")
    return lines
