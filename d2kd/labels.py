"""Names as matplotlib shows them, which Detectron2 draws with, too."""


def as_label(name: str) -> str:
    """A name that somebody chose, without what matplotlib would make of it: a formula of what
    stands between dollars, and nothing in a legend of what begins with an underscore."""
    visible = f" {name}" if name.startswith("_") else name
    return visible.replace("$", r"\$")
