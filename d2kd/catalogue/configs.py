"""The shipped configs: recipes, detectors to train or to teach, and what they are based on."""

import functools
import glob
import os
from typing import Any, Dict, Iterator, List, NamedTuple

import yaml

from d2kd.model_zoo import CONFIG_DIRS

ABLATION = "_ablation"  # ending of the names of tables


class Config(NamedTuple):
    """A shipped config."""

    name: str  # of the file below configs/, without its ending
    path: str

    @property
    def file(self) -> str:
        """What ``--config-file`` takes."""
        return f"{self.name}.yaml"

    @property
    def about(self) -> str:
        """The comment at the top of the file, on one line."""
        with open(self.path) as f:
            lines = f.read().splitlines()
        return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))

    @property
    def own(self) -> Dict[str, Any]:
        """What stands in the file itself."""
        return _content(self.path)

    @property
    def methods(self) -> List[str]:
        return self._distill("METHODS") or []

    @property
    def teacher(self) -> str:
        """``TEACHER.CONFIG``."""
        return self._distill("TEACHER.CONFIG") or ""

    def _distill(self, key: str) -> Any:
        """What stands at a place below ``DISTILL``, in the file or the first below it that says."""
        for config in bases(self):
            value: Any = config.own.get("DISTILL", {})
            for part in key.split("."):
                value = value.get(part, {}) if isinstance(value, dict) else {}
            if value != {}:
                return value
        return None


def configs() -> Dict[str, Config]:
    """All shipped configs by name, tables of ablations left out."""
    return {name: c for name, c in _files().items() if not name.endswith(ABLATION)}


def tables() -> Dict[str, Config]:
    """All shipped tables of ablations by name, which ``d2kd compare`` reads."""
    return {name: c for name, c in _files().items() if name.endswith(ABLATION)}


@functools.cache
def _files() -> Dict[str, Config]:
    found: Dict[str, Config] = {}
    for folder in CONFIG_DIRS:
        paths = glob.glob(os.path.join(folder, "**", "*.yaml"), recursive=True)
        for path in sorted(paths):
            name = os.path.splitext(os.path.relpath(path, folder))[0].replace(os.sep, "/")
            found.setdefault(name, Config(name, path))
    return found


def recipes() -> List[Config]:
    """The configs in which something is distilled, those of the embedded data last."""
    found = [config for config in configs().values() if config.methods]
    return sorted(found, key=lambda config: (config.name.startswith("shapes/"), config.name))


def bases(config: Config) -> Iterator[Config]:
    """A config and what it is based on, in the order in which values win."""
    yield config
    named = config.own.get("_BASE_", [])
    for base in [named] if isinstance(named, str) else reversed(named):
        path = os.path.normpath(os.path.join(os.path.dirname(config.path), base))
        name = next((x.name for x in configs().values() if x.path == path), None)
        if name:
            yield from bases(configs()[name])


@functools.cache
def _content(path: str) -> Dict[str, Any]:
    with open(path) as f:
        return yaml.load(f, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
