"""The tools: each can be started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = sorted(Path(__file__).parent.parent.glob("tools/*.py"))
IMPORT = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"


@pytest.mark.skipif(not TOOLS, reason="not in a checkout")
def test_every_tool_finds_what_it_imports(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOLS[0].parent), *sys.path])}
    words = [sys.executable, "-W", "ignore", "-c", IMPORT, *map(str, TOOLS)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
