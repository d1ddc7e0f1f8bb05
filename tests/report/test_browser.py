"""The page in headless Chromium: no request, no error on the console, and pictures with ink.

Chromium asks its maker for things of its own accord; a page's requests are those that its log of
the network says were started by an origin. Names of hosts resolve to nothing.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np
import pytest

from report import figures, html
from report.report import Report
from tests.report.example_report import example

pytestmark = pytest.mark.browser
WIDTH, HEIGHT = 760, 620  # of the space for one picture, in pixels
FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
BAD = """<!doctype html><title>bad</title><script>console.error("planted")</script>
<img src="http://outside.example/x.png"><p>text</p>"""


class Seen(NamedTuple):
    """What a browser did with a page."""

    requests: list[str]
    console: list[str]
    picture: np.ndarray  # (height, width, 3), 0 to 1


def browse(page: str, folder: Path, width: int = 1280, height: int = 1000) -> Seen:
    """Open a page from a file, with a profile of its own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium on the path; Debian: apt-get install -y chromium")
    file, log, shot = folder / "page.html", folder / "net.json", folder / "page.png"
    file.write_text(page, "utf-8")
    own = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", f"--screenshot={shot}"]
    if os.geteuid() == 0:
        own.append("--no-sandbox")  # which root cannot have
    command = [program, *FLAGS, *own, f"--window-size={width},{height}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and shot.exists(), done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(_requests(log), console, matplotlib.image.imread(shot)[..., :3])


def _requests(log: Path) -> list[str]:
    """Addresses that the page asked for."""
    found = json.loads(log.read_text())
    start = found["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    events = [event["params"] for event in found["events"] if event["type"] == start]
    jobs = [job for job in events if "url" in job]  # not their ends
    urls = [job["url"] for job in jobs if job.get("initiator", "") != "not an origin"]
    return [url for url in urls if not url.startswith(("data:", "file:"))]


@pytest.fixture(scope="module")
def page() -> str:
    return html.page(example())


def test_a_bad_page_is_noticed(tmp_path):
    seen = browse(BAD, tmp_path)
    assert seen.requests == ["http://outside.example/x.png"]
    assert any("planted" in line for line in seen.console)


@pytest.mark.parametrize("policy", [True, False], ids=["as it is", "without its policy"])
def test_no_request_and_no_error(page, tmp_path, policy):
    """Without the policy, which would stop requests, there are none either."""
    if not policy:
        page, dropped = re.subn(
            r'<meta http-equiv="Content-Security-Policy".*?>', "", page, flags=re.S
        )
        assert dropped == 1
    seen = browse(page, tmp_path)
    assert seen.requests == []
    assert seen.console == []
    assert (seen.picture.min(axis=-1) < 0.5).mean() > 0.005  # dark text on white
    assert seen.picture[-1, -1].min() == 1


def test_the_policy_stops_what_a_name_smuggles_in(page, tmp_path):
    seen = browse(page.replace("<main>", "<main>" + BAD, 1), tmp_path)
    assert seen.requests == []
    assert any("Content Security Policy" in line for line in seen.console)
    assert not any("planted" in line for line in seen.console)


def pixels(region: np.ndarray, colour: str) -> int:
    """How many have this colour, or nearly: thin lines blend with what they cross."""
    wanted = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return int((abs(region - wanted) < 0.1).all(axis=-1).sum())


def test_pictures_are_not_blank(tmp_path):
    """Each in a space of its own, with every colour that it draws with; the last is a blank one."""
    pictures = figures.draw(example())
    spaces = [found.svg for found in pictures] + ['<svg width="400" height="300"></svg>']
    style = f"body{{margin:0}}div{{height:{HEIGHT}px;overflow:hidden}}svg{{max-width:{WIDTH}px}}"
    body = "".join(f"<div>{svg}</div>" for svg in spaces)
    seen = browse(
        f"<!doctype html><style>{style}</style>{body}", tmp_path, WIDTH, HEIGHT * len(spaces)
    )
    regions = [seen.picture[HEIGHT * i : HEIGHT * (i + 1)] for i in range(len(spaces))]
    assert (regions[-1] == 1).all()
    for found, region in zip(pictures, regions, strict=False):
        assert 0.01 < (region < 1).any(axis=-1).mean() < 0.5, found.title
        drawn = [colour for colour in figures.picture.COLOURS if colour in (found.svg or "")]
        assert len(drawn) >= 2
        assert all(pixels(region, colour) > 20 for colour in drawn), found.title
        assert (region[:, -1] == 1).all() and (region[-1] == 1).all(), f"{found.title} is cut"


def test_a_report_of_nothing_has_no_error(tmp_path):
    seen = browse(html.page(Report([], "cpu", {}, None)), tmp_path)
    assert (seen.requests, seen.console) == ([], [])
