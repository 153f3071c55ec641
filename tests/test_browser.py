"""The scenes in a real browser: in JupyterLab, as pages opened from a file, as the app. Nothing leaves the machine."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from minianyflow.browser import (
    READY,
    chromium,
    jupyter_lab,
    open_notebook,
    run_cells,
    shut_down,
    watched,
    write_notebook,
)
from minianyflow.live import TITLES, serve
from minianyflow.offline import write_pages
from minianyflow.scenes import SCENES

pytestmark = pytest.mark.slow

PIXELS = "() => [...document.querySelectorAll('.lm-player canvas')].map((each) => each.toDataURL()).join()"
PLAYER, RANGE, CHOICES = ".lm-player", ".lm-bar input[type=range]", ".lm-choices select"
CONTROLS = ".widget-dropdown, .widget-hslider, .widget-checkbox, .widget-toggle-buttons"


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with a notebook a scene, and three more with something wrong; its address."""
    folder = tmp_path_factory.mktemp("notebooks")
    labels = "print(*(control.description for control in scene.controls.values()), sep='|')"
    for name in SCENES:
        write_notebook(
            folder / f"{name}.ipynb", f"from minianyflow import scenes\nscene = scenes.{name}()\nscene", labels
        )
    race = "from minianyflow import scenes\nscene = scenes.race()\n"
    loose = "for control in scene.controls.values():\n    control.unobserve(scene.on_change, 'value')\n"
    wrong = "def draw(*args, **state):\n    raise ValueError('nothing to draw')\nscene.draw = draw\n"
    write_notebook(folder / "disconnected.ipynb", race + loose + "scene")
    write_notebook(folder / "wrong.ipynb", race + wrong + "scene")
    with jupyter_lab(folder) as address:
        yield address


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return dict(zip(SCENES, write_pages(folder, quiet=True), strict=True))


@contextmanager
def running(browser, address, name):
    """A page with that notebook, run until its picture is there."""
    with watched(browser) as page:
        open_notebook(page, address, f"{name}.ipynb")
        run_cells(page)
        page.wait_for_selector(READY)
        yield page
        shut_down(page)


@dataclass
class Control:
    """A control as the page shows it; `move` does what a hand would."""

    label: str
    element: object

    def move(self):
        kind = self.element.get_attribute("class")
        if "dropdown" in kind:
            step(self.element.locator("select"))
        elif "checkbox" in kind:
            self.element.locator("input").click()
        elif "toggle" in kind:
            self.element.locator("button:not(.mod-active)").first.click()
        else:
            handle = self.element.locator(".noUi-handle")
            at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
            handle.press("ArrowLeft" if at_end else "ArrowRight")


def step(select):
    """Choose the next option."""
    index = select.evaluate("(each) => (each.selectedIndex + 1) % each.options.length")
    select.select_option(index=index)


def controls(page):
    found = [each for each in page.locator(CONTROLS).all() if each.is_visible()]
    return [Control(each.locator("label").first.inner_text().strip(), each) for each in found]


def redrawn(page, before, timeout=None):
    """Whether the canvases' pixels are others than `before`, now or soon."""
    from playwright.sync_api import TimeoutError as TookTooLong

    try:
        page.wait_for_function(f"(before) => ({PIXELS})() !== before", arg=before, timeout=timeout, polling=100)
    except TookTooLong:
        return False
    return True


def position(page):
    return float(page.get_attribute(PLAYER, "data-position"))


def is_well(page):
    """No error on the page, in the console, below the player; nothing asked for beyond loopback."""
    assert page.complaints == []
    assert page.blocked == []
    assert not [each.inner_text() for each in page.locator(".lm-error").all() if each.is_visible()]


@pytest.mark.parametrize("name", SCENES)
def test_every_control_changes_the_picture(browser, lab, name):
    with running(browser, lab, name) as page:
        page.wait_for_selector(".jp-OutputArea-output pre")
        expected = page.locator(".jp-OutputArea-output pre").last.inner_text().strip().split("|")
        assert [control.label for control in controls(page)] == expected
        for control in controls(page):
            before = page.evaluate(PIXELS)
            control.move()
            assert redrawn(page, before), control.label
        before = page.evaluate(PIXELS)
        page.locator(RANGE).evaluate("(each) => { each.value = 0.4; each.dispatchEvent(new Event('input')); }")
        assert redrawn(page, before), "time"
        is_well(page)


def test_a_disconnected_control_is_noticed(browser, lab):
    with running(browser, lab, "disconnected") as page:
        page.wait_for_timeout(1000)  # until the panels have their size
        for control in controls(page):
            before = page.evaluate(PIXELS)
            control.move()
            assert not redrawn(page, before, timeout=1500), control.label


def test_an_error_in_a_callback_is_shown(browser, lab):
    with running(browser, lab, "wrong") as page:
        controls(page)[0].move()
        page.wait_for_selector("pre.lm-error")
        assert "nothing to draw" in page.inner_text("pre.lm-error")


def test_keys_move_time_and_not_the_notebook(browser, lab):
    with running(browser, lab, "race") as page:
        cells = page.locator(".jp-Cell").count()
        for focused in (PLAYER, RANGE):
            page.focus(focused)
            page.keyboard.press("End")
            page.wait_for_function("document.querySelector('.lm-player').dataset.position == '1.0000'")
            for key, moved in (("ArrowLeft", -1), ("ArrowLeft", -1), ("ArrowRight", 1)):
                at, before = position(page), page.evaluate(PIXELS)
                page.keyboard.press(key)
                assert redrawn(page, before)
                assert (position(page) - at) * moved > 0
            page.keyboard.type("ddx")  # in JupyterLab: delete the cell, cut the cell
            assert page.locator(".jp-Cell").count() == cells
        at = position(page)
        page.focus(PLAYER)
        page.keyboard.press(" ")
        page.wait_for_function("(at) => Number(document.querySelector('.lm-player').dataset.position) != at", arg=at)
        page.keyboard.press(" ")
        assert page.inner_text(".lm-bar button") == "Play"
        page.locator(".jp-InputPrompt").last.click()
        page.keyboard.type("dd")  # the same keys where JupyterLab has the focus
        page.wait_for_function("(cells) => document.querySelectorAll('.jp-Cell').length < cells", arg=cells)
        is_well(page)


def test_a_kernel_restart_recovers(browser, lab):
    with running(browser, lab, "race") as page:
        page.evaluate(f"document.querySelector('{PLAYER}').dataset.old = '1'")
        run_cells(page, restart=True)
        page.wait_for_selector(f"{READY}:not([data-old])")
        page.wait_for_selector(f"{PLAYER}[data-old]", state="detached")
        before = page.evaluate(PIXELS)
        controls(page)[0].move()
        assert redrawn(page, before)
        is_well(page)


@pytest.mark.parametrize("name", SCENES)
def test_a_page_from_a_file_scrubs_and_switches(browser, pages, name):
    assert pages[name].stat().st_size < 3e6
    with watched(browser, offline=True) as page:
        page.goto(pages[name].as_uri())
        page.wait_for_selector(READY)
        assert page.locator(CHOICES).count() > 0
        for choice in page.locator(CHOICES).all():
            before = page.evaluate(PIXELS)
            chosen = choice.input_value()
            step(choice)
            assert redrawn(page, before), choice.get_attribute("name")
            after = page.evaluate(PIXELS)
            choice.select_option(chosen)  # back: what one choice offers may depend on another
            assert redrawn(page, after)
        before = page.evaluate(PIXELS)
        page.focus(PLAYER)
        page.keyboard.press("ArrowLeft")
        assert redrawn(page, before)
        assert position(page) < 1
        is_well(page)


def test_the_app_shows_every_scene(browser):
    with serve("race") as (address, _), watched(browser) as page:
        page.goto(address)
        page.wait_for_selector(READY)
        before = page.evaluate(PIXELS)
        control = controls(page)[1]  # the first is the menu of scenes
        control.move()
        assert redrawn(page, before), control.label
        for title in list(TITLES.values())[1:]:
            before = page.evaluate(PIXELS)
            page.click(f"button:has-text('{title[3:]}')")
            assert redrawn(page, before), title
            page.wait_for_selector(READY)
        is_well(page)
