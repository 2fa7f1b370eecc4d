"""The page in a real browser, where Chromium is installed. Run by ``make test-docs``."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from d2kd.report import write_report

pytestmark = pytest.mark.docs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Told as the title by a script that the test adds: what the browser made of the page
SCRIPT = """<script>addEventListener("load", () => {
  const pictures = [...document.images];
  document.title = JSON.stringify({
    pictures: pictures.length,
    broken: pictures.filter(x => !x.complete || !x.naturalWidth).length,
    sections: [...document.querySelectorAll("h2")].map(x => x.id),
    requests: performance.getEntriesByType("resource").map(x => x.name),
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
});</script>"""


def browse(page, folder, *flags):
    """Opens a page in a browser that finds no host."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder}/profile", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--window-size=1200,3000", *flags, page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def seen(page, folder, more=""):
    """What a browser tells of a page, to which more may be added."""
    copy = folder / "copy.html"
    copy.write_text(page.read_text() + more + SCRIPT)
    return json.loads(re.search(r"<title>(.*?)</title>", browse(copy, folder, "--dump-dom"))[1])


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it_without_a_network(distilled, plain, tmp_path):
    page = tmp_path / "report.html"
    write_report([distilled], plain, str(page))
    found = seen(page, tmp_path)
    assert found["pictures"] >= 20 and found["broken"] == 0
    assert {"pair", "ap", "losses", "detections", "looks", "cost"} <= set(found["sections"])
    assert not [request for request in found["requests"] if not request.startswith("data:")]
    assert found["wider"] <= 0
    other = "http://example.com/x.png"  # what would be noticed
    assert other in seen(page, tmp_path, f"<img src={other}>")["requests"]

    browse(page, tmp_path, f"--screenshot={tmp_path}/page.png")
    drawn = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert drawn.shape == (3000, 1200)
    assert all((drawn[i : i + 1000] < 128).any() for i in (0, 1000, 2000))
