"""Around the scenes, without a browser: what is installed, what is served, what a page holds, what the table says."""

import base64
import gzip
import json
import re
import socket

import pytest

from benchmarks import scene_speed as bench_live
from minianyflow.live import app as live
from minianyflow.live import browser, scenes
from minianyflow.live import pages as offline
from minianyflow.support import install
from minianyflow.support.errors import InputError


def test_a_missing_browser_is_one_line_or_installed(monkeypatch):
    calls = []
    monkeypatch.setattr(install, "APPLICATIONS", ())
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(install.os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(install.subprocess, "call", lambda command, **options: calls.append(command))
    with pytest.raises(InputError, match="apt install chromium") as problem:
        install.browser()
    assert len(str(problem.value).splitlines()) == 1
    assert calls == []  # not without being asked
    with pytest.raises(InputError, match="apt install chromium"):
        install.browser(install=True)  # where apt-get fails
    assert [command[0] for command in calls] == ["apt-get"] * 2
    assert "chromium" in calls[1]
    monkeypatch.setattr(install.os, "geteuid", lambda: 1000, raising=False)
    with pytest.raises(InputError):
        install.browser(install=True)
    assert len(calls) == 2  # not without the right
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/bin/{name}" if name == "google-chrome" else None)
    assert install.browser() == "/bin/google-chrome"


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be had"), live.serve(port=port):
            pass
    with pytest.raises(InputError, match="port 99999"):
        browser.free_port(99999)


def test_a_server_that_does_not_come_up_is_named_with_its_last_words(tmp_path):
    script = tmp_path / "server.py"
    script.write_text("print('no such template')\nraise SystemExit(1)")
    dies = browser.serving([script], "http://127.0.0.1:9/", tmp_path / "log", seconds=20)
    with pytest.raises(InputError, match="no such template"), dies:
        pass


def test_the_app_has_every_scene_and_builds_only_what_is_shown(monkeypatch):
    assert list(live.TITLES) == list(scenes.SCENES)
    opened = []
    real = scenes.open_scene
    monkeypatch.setattr(scenes, "open_scene", lambda name: opened.append(name) or real(name))
    menu, stage = live.app("race").children
    assert opened == ["race"]
    (race,) = stage.children
    menu.value = "triangle"
    assert opened == ["race", "triangle"]
    assert stage.children != (race,)
    menu.value = "race"
    assert stage.children == (race,)
    assert opened == ["race", "triangle"]  # and what was built is kept

    def fails(name):
        assert "drawing Video" in stage.children[0].value  # what is seen meanwhile
        raise ValueError("weights are missing")

    monkeypatch.setattr(scenes, "open_scene", fails)
    with pytest.raises(ValueError, match="missing"):
        menu.value = "video"
    assert "weights are missing" in stage.children[0].value


def test_the_terminal_learns_why_a_scene_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    live.prepared("race")
    assert (tmp_path / "ready").read_text() == ""
    monkeypatch.setattr(live, "app", lambda first: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        live.prepared("race")
    assert "division" in (tmp_path / "ready").read_text()


def test_a_page_holds_the_scene_and_asks_for_nothing(tmp_path):
    page, payload = scenes.race().payloads()
    page["title"] = "</script>"
    text = offline.page_text(page, payload)
    assert gzip.decompress(base64.b64decode(re.search(r'atob\("([^"]+)"', text)[1])) == payload
    held = json.loads(re.search(r'getElementById\("scene"\), (\{.*\}), payload\)', text)[1])
    assert held["scenes"].keys() == page["scenes"].keys()
    script = text[text.index("<script") :]
    assert script.count("</script") == 1  # nothing in it ends it early
    assert not re.search(r"https?://|src=|@import|url\(", text.replace('href="data:,"', ""))


def test_unknown_scenes_and_endings_are_one_line(tmp_path):
    with pytest.raises(InputError, match="did you mean 'race'"):
        offline.write_pages(tmp_path, ["rcae"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"\.gif"):
        offline.animate("race.html", "race.png")


def test_the_table_says_which_bar_is_missed():
    figures = {"scrub": [29, 10, 31], "control": [200, 100, 149], "notebook": [3.0], "live": [6.1, 7]}
    assert bench_live.missed(figures) == ["scrub", "live"]
    lines = bench_live.table(figures).splitlines()
    assert ["MISSED" in line for line in lines] == [False, True, False, False, True, False]
    assert "150" in lines[2]
    with pytest.raises(InputError, match="at least 1"):
        bench_live.report(repeats=0)
