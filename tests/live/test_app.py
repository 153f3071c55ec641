"""Around the scenes, without a browser: what is installed, what is served, what a page holds."""

import base64
import gzip
import json
import re

import pytest

from benchmarks.browser import serving
from minianyflow.live import pages
from minianyflow.live.commands import live_html
from minianyflow.support import install
from minianyflow.support.errors import InputError


@pytest.mark.parametrize(("wanted", "user", "calls"), [(False, 0, 0), (True, 1000, 0), (True, 0, 2)])
def test_a_missing_browser_is_one_line_and_installed_only_if_that_is_wanted_and_allowed(
    wanted, user, calls, monkeypatch
):
    called = []
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(install.os, "geteuid", lambda: user, raising=False)
    monkeypatch.setattr(install.subprocess, "call", lambda command, **options: called.append(command))
    with pytest.raises(InputError, match="setup --browser"):
        install.browser(wanted)  # apt-get fails
    assert [command[0] for command in called] == ["apt-get"] * calls
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/bin/{name}" if name == "google-chrome" else None)
    assert install.browser() == "/bin/google-chrome"


def test_a_server_that_does_not_come_up_is_named_with_its_last_words(tmp_path):
    script = tmp_path / "server.py"
    script.write_text("print('no such template')\nraise SystemExit(1)")
    dies = serving([script], lambda: False, tmp_path / "log", {}, seconds=20)
    with pytest.raises(InputError, match="no such template"), dies:
        pass


def test_a_page_holds_the_scene_and_asks_for_nothing():
    page, payload = {"title": "</script>$x", "controls": [], "scenes": {"": {"note": "</script>"}}}, b"some bytes"
    text = pages.page_text(page, payload)
    assert gzip.decompress(base64.b64decode(re.findall(r'atob\("([^"]+)"', text)[-1])) == payload
    assert json.loads(re.search(r'getElementById\("scene"\), (\{.*\}), payload\)', text)[1]) == page
    script = text[text.index("<script") :]
    assert script.count("</script") == 1  # nothing in it ends it early
    assert not re.search(r"https?://|src=|@import|url\(", text.replace('href="data:,"', ""))


def test_unknown_scenes_and_endings_are_one_line(tmp_path):
    with pytest.raises(InputError, match="did you mean 'race'"):
        live_html(["--scene", "rcae", "--output", str(tmp_path), "--quiet"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"\.gif"):
        pages.animate("race.html", "race.png")
