"""Around the scenes, without a browser: what is installed, what is served, what a page holds."""

import base64
import gzip
import json
import re
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import websocket

from benchmarks.browser import TOKEN, jupyter_lab, serving
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


@pytest.mark.slow
def test_kernels_end_with_their_page_and_strangers_are_refused(tmp_path):
    def asked(method="GET", path="/api/kernels", **headers):
        headers = headers or {"Authorization": f"token {TOKEN}"}
        try:
            with urlopen(Request(address + path, method=method, headers=headers), timeout=60) as answer:
                return answer.headers["Set-Cookie"] if "token=" in path else json.load(answer)
        except HTTPError as problem:
            return problem.code

    def kernels(count, patience=120):
        end = time.monotonic() + patience
        while len(found := asked()) != count and time.monotonic() < end:
            time.sleep(0.2)
        return {kernel["id"] for kernel in found}

    def page(kernel, **options):
        channels = f"ws{address[4:]}/api/kernels/{kernel}/channels"
        return websocket.create_connection(channels, timeout=60, cookie=cookie, **options)

    with jupyter_lab(tmp_path, alone=3) as address:
        assert asked(Authorization="") == asked(Authorization="token x") == asked(Host="evil.example") == 403
        cookie = asked(path=f"/lab?token={TOKEN}").partition(";")[0]  # what a browser sends, whoever asks it to
        assert len(asked(Cookie=cookie)) == 0
        assert asked(Cookie=cookie, Origin="http://evil.example") == 404
        started = [asked("POST")["id"] for _ in range(3)]
        pages = [page(kernel) for kernel in started]
        with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
            page(started[0], origin="http://evil.example")
        assert kernels(3) == {*started}
        pages[0].close()  # left
        pages[1].sock.close()  # the tab crashed
        assert kernels(1) == {started[2]}
        time.sleep(6)  # two rounds of culling
        assert kernels(1) == {started[2]}  # its page is open
        pages[2].close()
        assert kernels(0) == set()


def test_a_page_holds_the_scene_and_asks_for_nothing():
    page, payload = {"title": "</script>$x", "controls": [], "scenes": {"": {"note": "</script>"}}}, b"some bytes"
    text = pages.page_text(page, payload)
    assert gzip.decompress(base64.b64decode(re.findall(r'atob\("([^"]+)"', text)[-1])) == payload
    assert json.loads(re.search(r"const page = (\{.*\}), choices", text)[1]) == page
    script = text[text.index("<script type") :]
    assert script.count("</script") == 1  # nothing in it ends it early
    assert not re.search(r"https?://|src=|@import|url\(", re.sub(r'(href|src)="data:', "", text))


def test_unknown_scenes_and_endings_are_one_line(tmp_path):
    with pytest.raises(InputError, match="did you mean 'race'"):
        live_html(["--scene", "rcae", "--output", str(tmp_path), "--quiet"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"\.gif"):
        pages.animate("race.html", "race.png")
