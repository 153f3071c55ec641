"""The scenes in a real browser: in JupyterLab, as pages opened from a file, as the app. Nothing leaves the machine."""

import time
from contextlib import contextmanager

import nbformat
import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from benchmarks.browser import KERNEL, jupyter_lab, open_notebook, run_cells, shut_down, watched, write_notebook
from minianyflow.course.notebooks import notebooks
from minianyflow.live.pages import DONE, READY, chromium, page_text, write_pages
from minianyflow.live.player import Pack, time_axis
from minianyflow.live.scenes import SCENES

pytestmark = pytest.mark.slow

PIXELS = "() => [...document.querySelectorAll('.lm-player canvas')].map((canvas) => canvas.toDataURL()).join()"
PLAYER, RANGE, CHOICES, HAND = ".lm-player", ".lm-bar input[type=range]", ".lm-choices select", "canvas.lm-drag"
CONTROLS = ".lm-choices label"
LABELS = "print(*(control['label'] for control in _.controls.values()), sep='|')"  # _: what the cell before showed
MARK = "document.querySelector('.lm-player').dataset.old = '1'"
PLACES = {
    "race": "00",
    "triangle": "03",
    "backward_simulation": "05",
    "video": "06",
    "exposure": "07a",
    "stream": "07b",
}

# Nothing more is coming: all is computed, and the screen was drawn three times, ours not once; a kernel is idle.
SETTLED = f"""async () => {{
  const drawn = () => [...document.querySelectorAll(".lm-player")].map((player) => player.dataset.frames).join();
  const idle = () => ({KERNEL}?.status ?? "idle") === "idle";
  const rests = () => !document.querySelector('.lm-player:not([data-done="1"])') && idle();
  for (let quiet = 0, before = drawn(); quiet < 3; quiet++) {{
    await new Promise(requestAnimationFrame);
    if (drawn() !== before || !rests()) [quiet, before] = [-1, drawn()];
  }}
}}"""
REPLACE = """(sources) => {
  const notebook = jupyterapp.shell.currentWidget.content.model.sharedModel;
  notebook.deleteCellRange(0, notebook.cells.length);
  notebook.insertCells(0, sources.map((source) => ({ cell_type: "code", source, metadata: {}, outputs: [] })));
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright, chromium(playwright) as opened:
        yield opened


@pytest.fixture(scope="module")
def scene_cells():
    """{scene: (its notebook, the number of its cell)}."""
    cells = [(path, k, cell) for path in notebooks() for k, cell in enumerate(nbformat.read(path, 4).cells)]
    code = [place for place in cells if place[2].cell_type == "code"]
    return {name: (path, k) for name in SCENES for path, k, cell in code if f"scenes.{name}(" in cell.source}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with two empty notebooks; its address."""
    folder = tmp_path_factory.mktemp("notebooks")
    for name in ("stage", "closed"):
        write_notebook(folder / f"{name}.ipynb", "")
    with jupyter_lab(folder) as address:
        yield address


@pytest.fixture(scope="module")
def stage(browser, lab):
    """One notebook with one kernel, open for every test: `run_in` gives it other cells."""
    with watched(browser) as page:
        open_notebook(page, lab, "stage.ipynb")
        yield page
        shut_down(page)


def run_in(page, *cells):
    """Replace all cells of the notebook, run them, and wait until the picture of the new ones is there."""
    page.complaints.clear()
    page.evaluate(REPLACE, list(cells))
    page.wait_for_selector(PLAYER, state="detached")
    run_cells(page)
    page.wait_for_selector(READY)
    return page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return dict(zip(SCENES, write_pages(tmp_path_factory.mktemp("pages"), quiet=True), strict=True))


@contextmanager
def opened(browser, path):
    """A page opened from a file, without a network; all must be well when it is closed."""
    with watched(browser, offline=True) as page:
        page.goto(path.as_uri())
        page.wait_for_selector(READY)
        yield page
        is_well(page)


def controls(page):
    """{label: element} of the scene's controls."""
    return {label.evaluate("(label) => label.firstChild.data"): label for label in page.locator(CONTROLS).all()}


def move(control):
    """Move a control as a hand would: to the next option, or one step along a slider."""
    if control.locator("select").count():
        return step(control.locator("select"))
    handle = control.locator("input")
    return handle.press("ArrowLeft" if handle.evaluate("(range) => range.value === range.max") else "ArrowRight")


def step(select):
    """Choose the next option."""
    index = select.evaluate("(select) => (select.selectedIndex + 1) % select.options.length")
    select.select_option(index=index)


def seen(page):
    """The pixels of all canvases, once nothing moves."""
    page.evaluate(SETTLED)
    return page.evaluate(PIXELS)


def redraws(page, act, *arguments):
    """act(*arguments) changes the pixels of the canvases; a timeout of playwright if it does not."""
    before = seen(page)
    act(*arguments)
    page.wait_for_function(f"(before) => ({PIXELS})() !== before", arg=before, polling=100)


def position(page):
    return float(page.get_attribute(PLAYER, "data-position"))


# What a hand or a key can reach in a scene and a screen reader has no name for.
NAMELESS = """() => [...document.querySelectorAll(".lm-scene :is(button, input, select, canvas)")]
  .filter((part) => ![part.ariaLabel, part.labels?.[0]?.textContent, part.textContent].some((name) => name?.trim()))
  .map((part) => part.outerHTML)"""


def is_well(page):
    """No error on the page, in the console, below the player; all has a name; nothing asked for beyond loopback."""
    assert page.evaluate(NAMELESS) == []
    assert page.complaints == []
    assert page.blocked == []
    assert not [error.inner_text() for error in page.locator(".lm-error").all() if error.is_visible()]


@pytest.mark.parametrize("name", ["race", "stream"])  # computed in the page; drawn by the kernel
def test_every_control_of_a_notebooks_scene_changes_the_picture(stage, name, scene_cells):
    path, number = scene_cells[name]
    assert path.name.startswith(PLACES[name])
    page = run_in(stage, nbformat.read(path, 4).cells[number].source, LABELS)
    page.wait_for_selector(".jp-OutputArea-output pre")
    expected = page.locator(".jp-OutputArea-output pre").last.inner_text().strip().split("|")
    assert list(controls(page)) == expected
    for control in controls(page).values():
        redraws(page, move, control)
    to = "(range) => { range.value = 0.4; range.dispatchEvent(new Event('input')); }"
    redraws(page, page.locator(RANGE).evaluate, to)
    is_well(page)


def test_a_stream_goes_on_while_hands_change_it(stage):
    """The frame's number never falls; steps and prompt that are moved on the way are those of the next chunks."""
    page = run_in(stage, "from minianyflow.live import scenes\nscenes.stream()")
    shown = "document.querySelector('.lm-bar output:last-of-type').textContent.split('= ')[1]"
    page.evaluate(f"() => {{ window.heard = []; window.hears = setInterval(() => heard.push(Number({shown})), 5); }}")
    page.click(".lm-bar button >> text=Play")
    page.wait_for_function("() => heard.at(-1) > 24")
    move(controls(page)["steps a chunk"])
    move(controls(page)["prompt"])
    page.wait_for_selector("figcaption >> text=two balls, 8 steps a chunk")
    at = page.evaluate("() => heard.at(-1)")
    page.wait_for_function("(at) => heard.at(-1) > at + 16", arg=at)
    heard = page.evaluate("() => heard")
    assert heard == sorted(heard)
    assert page.locator(".lm-measures b").count() == 3
    page.evaluate("() => clearInterval(hears)")
    page.click(".lm-bar button >> text=Pause")
    is_well(page)


def test_keys_move_time_and_not_the_notebook(stage):
    page = run_in(stage, "from minianyflow.live import scenes\nscene = scenes.race()\nscene", "scene.state()")
    cells = page.locator(".jp-Cell").count()
    for focused in (PLAYER, RANGE):
        page.focus(focused)
        page.keyboard.press("End")
        page.wait_for_function("document.querySelector('.lm-player').dataset.position == '1.0000'")
        for key, moved in (("ArrowLeft", -1), ("ArrowLeft", -1), ("ArrowRight", 1)):
            at = position(page)
            redraws(page, page.keyboard.press, key)
            assert (position(page) - at) * moved > 0
        page.keyboard.type("ddx")  # in JupyterLab: delete the cell, cut the cell
        assert page.locator(".jp-Cell").count() == cells
    at = position(page)
    page.focus(PLAYER)
    page.keyboard.press(" ")
    page.wait_for_function("(at) => Number(document.querySelector('.lm-player').dataset.position) != at", arg=at)
    page.keyboard.press(" ")
    assert page.inner_text(".lm-bar button") == "Play"
    is_well(page)
    page.locator(".jp-InputPrompt").last.click()
    page.keyboard.type("dd")  # the same keys where JupyterLab has the focus
    page.wait_for_function("(cells) => document.querySelectorAll('.jp-Cell').length < cells", arg=cells)


RESTARTED = ["race", *(pytest.param(name, marks=pytest.mark.long) for name in list(SCENES)[1:])]


@pytest.mark.parametrize("name", RESTARTED)
def test_a_scene_recovers_from_a_kernel_restart(stage, name):
    page = run_in(stage, f"from minianyflow.live import scenes\nscenes.{name}()")
    redraws(page, move, next(iter(controls(page).values())))
    page.evaluate(MARK)
    run_cells(page, restart=True)
    page.wait_for_selector(f"{READY}:not([data-old])")
    page.wait_for_selector(f"{PLAYER}[data-old]", state="detached")
    redraws(page, move, next(iter(controls(page).values())))
    is_well(page)


@pytest.mark.long
def test_a_scene_whose_kernel_was_started_anew_says_so(stage):
    page = run_in(stage, "from minianyflow.live import scenes\nscenes.stream()")
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    page.wait_for_function(f"{KERNEL}?.status == 'idle'")
    move(next(iter(controls(page).values())))
    page.get_by_text("run this cell again").wait_for()


def test_a_kernel_ends_when_its_notebook_is_closed(browser, lab):
    def kernels():
        return {kernel["id"] for kernel in page.request.get(f"{lab}/api/kernels").json()}

    with watched(browser) as page:
        open_notebook(page, lab, "closed.ipynb")
        own = page.evaluate(f"{KERNEL}.id")
        assert own in kernels()
        page.evaluate("() => { jupyterapp.shell.currentWidget.close() }")
        page.click(".jp-Dialog button:has-text('Discard')")  # JupyterLab asks whether to save it
        end = time.monotonic() + 120
        while own in kernels() and time.monotonic() < end:
            page.wait_for_timeout(200)
        assert own not in kernels()


@pytest.mark.parametrize("name", SCENES)
def test_a_page_from_a_file_scrubs_and_switches(browser, pages, name):
    assert pages[name].stat().st_size < (11e6 if name == "video" else 1.5e6)  # with all video networks
    with opened(browser, pages[name]) as page:
        page.evaluate("player.seek(1)")
        for control in controls(page).values():
            redraws(page, move, control)
        page.focus(PLAYER)
        redraws(page, page.keyboard.press, "ArrowLeft")
        assert position(page) < 1


def drag(page, start, end):
    """By hand over the triangle, from and to fractions of its width and height."""
    box = page.locator(HAND).bounding_box()
    for act, (across, down) in ((page.mouse.down, start), (page.mouse.up, end)):
        page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"], steps=5)
        act()


# The times of the jump at fractions of the triangle's width and height, whose margins are player.js's.
THERE = """([across, down]) => {
  const canvas = document.querySelector("canvas.lm-drag");
  const unit = parseFloat(getComputedStyle(canvas.closest(".lm-player")).fontSize) / 17;
  const [width, height] = [canvas.clientWidth / unit, canvas.clientHeight / unit];
  const side = Math.min(width - 68 - 14, height - 54 - 26);
  return [(across * width - 68) / side, 1 - (down * height - 26) / side];
}"""


def shows(page, *times):
    """Wait until '1.00 > 0.00' or the like stands below the triangle."""
    read = "(words) => document.querySelector('.lm-measures b').textContent === words"
    page.wait_for_function(read, arg=" > ".join(f"{time:.2f}" for time in times))


def test_the_hand_and_the_keys_move_a_jump(browser, pages):
    with opened(browser, pages["triangle"]) as page:
        page.evaluate("player.seek(1)")
        shows(page, 1, 0)
        target = controls(page)["to r"].locator("input")
        for _ in range(2):  # to the same place again
            drag(page, (0.95, 0.85), (0.8, 0.5))
            start, end = (round(64 * time) / 64 for time in page.evaluate(THERE, [0.8, 0.5]))
            shows(page, start, end)
            before = seen(page)
            page.mouse.move(5, 5)  # it does not stick to the hand
            assert seen(page) == before
            target.press("Home")
            shows(page, start, 0)
        page.focus(HAND)
        for _ in range(20):
            page.keyboard.press("ArrowUp")
        shows(page, start, 20 / 64)
        before = seen(page)
        page.keyboard.press("Control+ArrowUp")
        page.locator(HAND).click(button="right", position={"x": 100, "y": 100})
        assert seen(page) == before


COLOUR = """([x, y]) => {
  const canvas = document.querySelector(".lm-player canvas"), size = canvas.width;
  const at = (value) => Math.round(size / 2 + (value * size) / 4);
  return [...canvas.getContext("2d").getImageData(at(x), at(-y), 1, 1).data].slice(0, 3);
}"""


def test_the_plane_is_drawn_where_the_data_says(browser, tmp_path):
    pack = Pack()
    path = np.array([[[-1.0, 1.5], [1.0, -0.5]], [[1.0, 0.5], [-1.0, -1.5]]])  # (T, n, 2): to the right, to the left
    exact = np.array([[[-1.5, 0.25], [0.0, 0.0]], [[1.5, 0.25], [0.0, 0.0]]])
    shown = {"points": path, "exact": exact, "ghosts": np.array([[0.5, -1.75]])}
    panel = {"kind": "plane", "title": "two", "colour": "#0072b2", "times": [1, 0], "limit": 2, "followed": [0]}
    panel |= {name: pack.add_exact(values) for name, values in shown.items()}
    page = {
        "title": "two",
        "controls": [],
        "state": {},
        "scenes": {"": pack.scene("two", [panel], time_axis([1.0, 0.0]))},
    }
    (tmp_path / "two.html").write_text(page_text(page, pack.payload), encoding="utf-8")
    black, blue, white = [0, 0, 0], [0, 114, 178], [255, 255, 255]
    half = [  # of the way
        ((0, 1), black),  # the particle that is followed
        ((0, -1), blue),
        ((-0.5, 1.25), blue),  # where it came from
        ((0.5, 0.75), white),  # where it goes
        ((-0.5, -1.25), white),
        ((1, 0.25), [165, 165, 165]),  # the exact path
        ((0.5, -1.75), [200, 200, 200]),  # a grey dot
    ]
    with opened(browser, tmp_path / "two.html") as tab:
        for to, places in ((0.5, half), (1, [((1, 0.5), black), ((-1, -1.5), blue), ((0.5, 0.75), blue)])):
            tab.evaluate("(to) => player.seek(to)", to)
            tab.evaluate(SETTLED)
            assert [tab.evaluate(COLOUR, place) for place, _ in places] == [colour for _, colour in places]
            assert tab.evaluate(COLOUR, (0.5, -0.75)) not in (blue, white)  # the other's trail, paler


# How tall every word on a canvas is drawn, in pixels of the window.
WRITTEN = """(() => {
  window.written = [];
  const pen = CanvasRenderingContext2D.prototype, fillText = pen.fillText;
  pen.fillText = function (...words) {
    const { a, b } = this.getTransform();
    window.written.push((parseFloat(this.font) * Math.hypot(a, b)) / window.devicePixelRatio);
    return fillText.apply(this, words);
  };
})()"""
# The smallest words beside the canvases, what is cut off inside its box, and how far down the player reaches.
SEEN = """() => {
  const all = [...document.querySelectorAll("body *")].filter((box) => box.offsetParent && box.clientWidth);
  const says = (box) => [...box.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const size = (box) => parseFloat(getComputedStyle(box).fontSize);
  const tight = (box) => box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 2;
  const cuts = (box) => getComputedStyle(box).overflow !== "visible" && !box.matches("select, input, noscript");
  return {
    smallest: Math.min(...window.written, ...all.filter(says).map(size)),
    cut: all.filter((box) => cuts(box) && tight(box)).map((box) => `${box.className}: ${box.textContent}`),
    bottom: document.querySelector(".lm-player").getBoundingClientRect().bottom,
    right: document.documentElement.scrollWidth,
  };
}"""


@pytest.mark.parametrize("name", SCENES)
def test_a_page_fits_projectors_and_phones_in_light_and_dark(browser, pages, name):
    """All is inside the window, nothing is cut off; for a projector no word is smaller than 1/50 of its height."""
    with watched(browser) as page:
        page.add_init_script(WRITTEN)
        page.goto(pages[name].as_uri())
        page.wait_for_selector(DONE)
        for width, height, theme in (
            (1280, 720, "light"),
            (1920, 1080, "dark"),
            (390, 844, "dark"),
            (640, 360, "light"),
        ):
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=theme)
            page.evaluate("() => (window.written = [], player.again())")
            page.evaluate(SETTLED)
            found = page.evaluate(SEEN)
            assert found["right"] <= width, (name, width, found)
            assert not found["cut"], (name, width, found)
            if width > 1000:
                assert found["bottom"] <= height, (name, width, found)
                assert found["smallest"] >= height / 50, (name, width, found)
        is_well(page)


PHONE = {"width": 390, "height": 844}
WHERE = """([x, y]) => {
  const canvas = document.querySelector(".lm-player canvas"), box = canvas.getBoundingClientRect();
  return [box.left + (x / 4.8 + 0.5) * box.width, box.top + (0.5 - y / 4.8) * box.height];
}"""  # a place of the plane in the window


TOUCH = """([clientX, clientY]) => {
  const target = document.querySelector(".lm-player canvas");
  const touch = new Touch({ identifier: 1, target, clientX, clientY });
  return !target.dispatchEvent(new TouchEvent("touchstart", { touches: [touch], cancelable: true }));
}"""  # whether a touch there is kept from the page


def test_a_finger_moves_a_noise_and_scrolls_elsewhere_and_keys_do_as_well(browser, pages):
    with watched(browser, PHONE, has_touch=True, is_mobile=True) as page:
        page.goto(pages["race"].as_uri())
        page.wait_for_selector(DONE)
        send, noise = page.context.new_cdp_session(page).send, "[...player.world.z.slice(0, 2)]"

        def swipe(place, down):
            x, y = page.evaluate(WHERE, place)
            for part in range(6):
                points = [{"x": x, "y": y + down * part / 5}]
                kind = "touchMove" if part else "touchStart"
                send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
            send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            page.evaluate(SETTLED)

        x, y = page.evaluate(noise)
        swipe([x, y], -30)
        moved = page.evaluate(noise)
        assert moved[1] > y + 0.1
        assert page.evaluate("scrollY") == 0
        held = [page.evaluate(TOUCH, page.evaluate(WHERE, place)) for place in (moved, [2.3, -2.3])]
        assert held == [True, False]  # on a ring the page rests, elsewhere it scrolls
        page.locator(f"{PLAYER} canvas").first.press("1")
        page.locator(f"{PLAYER} canvas").first.press("ArrowDown")
        assert page.evaluate(noise)[1] < moved[1]
        is_well(page)


@pytest.mark.parametrize("fault", ["weights", "script", "no script"])
def test_what_goes_wrong_is_said_and_leaves_a_picture(browser, pages, tmp_path, fault):
    text = pages["race"].read_text(encoding="utf-8")
    if fault == "weights":  # of another version: a layer is wider
        text = text.replace('"sizes":[16,64', '"sizes":[16,65')
    if fault == "script":
        text = text.replace('<script type="module">', '<script type="module">throw new Error("no such browser");')
    (tmp_path / "race.html").write_text(text, encoding="utf-8")
    with watched(browser, java_script_enabled=fault != "no script") as page:
        page.goto((tmp_path / "race.html").as_uri())
        page.locator("#picture").wait_for(state="visible")
        words = {"weights": "another version", "script": "no such browser", "no script": "JavaScript"}[fault]
        assert words in page.inner_text("body")


def test_settings_in_the_address_open_a_page_there(browser, pages):
    with watched(browser) as page:
        page.goto(pages["race"].as_uri() + "#steps=16&dataset=ring8&seed=no")
        page.wait_for_selector(DONE)
        assert page.evaluate("({ ...player.state })") == {
            "steps": 16,
            "dataset": "ring8",
            "flow_map": "teacher_step",
            "seed": 0,
        }


def test_the_window_for_a_class_shows_every_scene(browser, pages):
    with watched(browser, offline=True) as page:
        page.goto((pages["race"].parent / "index.html").as_uri())
        for name in SCENES:
            page.click(f"nav a[href='{name}.html']")
            page.frame_locator("iframe").locator(f"body:has(h1) {READY}").wait_for()
        is_well(page)
