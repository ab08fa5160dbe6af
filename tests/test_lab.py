"""JupyterLab in a headless Chromium: controls by keyboard; pictures follow them and outlive the kernel."""

import json
import os
import re
import runpy
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import hcsmoe_core as core
from hcsmoe_core.studies import runner, sweep

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SMALL = {"model": "demo-qwen", "calibration": "demo", "sequences": 12, "length": 64}
EXPERTS, LAYERS = 32, 4  # of demo-qwen
PATIENCE = 240  # seconds: a notebook on two busy cores


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab as ``./run lab`` starts it, on copies of two notebooks with small parameters."""
    if CHROMIUM is None:
        say = pytest.fail if os.environ.get("HCSMOE_REQUIRE_BROWSER") == "1" else pytest.skip
        say("JUPYTERLAB NOT TESTED: there is no chromium, chromium-browser or google-chrome on this machine")
    folder = tmp_path_factory.mktemp("lab")
    for name in ("01_similarity", "02_dendrograms"):
        _parameterised(name, folder)
    job = runpy.run_path(str(ROOT / "run"))
    job["set_lab"](folder / "settings")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(), folder / "lab.log"
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    options = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
    ]
    server = subprocess.Popen(
        [sys.executable, *job["JOBS"]["lab"], *options, f"--LabApp.app_settings_dir={folder / 'settings'}"],
        cwd=folder,
        env=os.environ | own | {"JUPYTER_TOKEN": token},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    found = SimpleNamespace(
        folder=folder, notebooks=folder / "notebooks", log=log, url=f"http://127.0.0.1:{port}", token=token
    )
    try:
        _until(lambda: _answers(found) or server.poll() is not None, "JupyterLab to answer")
        assert server.poll() is None, log.read_text()
        yield found
    finally:
        server.terminate()  # its kernels go with it
        server.wait(60)


def _parameterised(name, folder):
    from papermill.iorw import load_notebook_node, write_ipynb
    from papermill.parameterize import parameterize_notebook

    (folder / "notebooks").mkdir(exist_ok=True)
    places = {"figures": str(folder / "figures"), "results": str(folder / f"{name}.json")}
    notebook = parameterize_notebook(load_notebook_node(str(sweep.notebook_path(name))), SMALL | places)
    write_ipynb(notebook, str(folder / "notebooks" / f"{name}.ipynb"))


def _until(true, what):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.2)


def _ask(lab, path, method="GET"):
    headers = {"Authorization": f"token {lab.token}"}
    with urllib.request.urlopen(
        urllib.request.Request(lab.url + path, method=method, headers=headers), timeout=60
    ) as answer:
        return json.loads(answer.read() or "null")


def _answers(lab):
    try:
        return bool(_ask(lab, "/api/status"))
    except OSError:
        return False


@contextmanager
def window(lab, name):
    """A notebook, opened in a fresh browser and with a fresh kernel; the browser may report no error."""
    from playwright.sync_api import expect, sync_playwright

    for session in _ask(lab, "/api/sessions"):
        _ask(lab, f"/api/sessions/{session['id']}", "DELETE")
    complaints = []
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1400, "height": 1600})
        page.set_default_timeout(PATIENCE * 1000)
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        try:
            page.goto(f"{lab.url}/lab/tree/{name}?reset&token={lab.token}")
            page.get_by_text(
                re.compile(r"\| Idle$")
            ).wait_for()  # of the kernel; what is sent to it earlier is lost
            yield page
            assert not complaints
        except Exception as error:
            picture = lab.folder / f"{Path(name).stem}.png"
            page.screenshot(path=picture)
            said = "\n".join(
                [*complaints, f"Picture: {picture}", "The server said:", lab.log.read_text()[-4000:]]
            )
            raise AssertionError(f"{error}\nThe browser complained: {said}") from error
        finally:
            browser.close()


def choose(page, *entries):
    for entry in entries:
        page.get_by_role("menuitem").filter(has=page.get_by_text(entry, exact=True)).click()


def run_all(page):
    """Run all cells; each must come to its end."""
    choose(page, "Run", "Run All Cells")
    error = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    page.wait_for_function(
        """() => document.querySelector('[data-mime-type="application/vnd.jupyter.error"]')
            || [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
                .every(e => /[0-9]/.test(e.textContent))"""
    )
    assert error.all_inner_texts() == []


def save(page):
    choose(page, "File", "Save Notebook")
    page.locator(".lm-TabBar-tab.jp-mod-current:not(.jp-mod-dirty)", has_text=".ipynb").wait_for()


def explorer(page, label):
    """The cell whose controls have one of that name."""
    return page.locator(
        ".jp-CodeCell", has=page.locator(".jupyter-widgets label", has_text=re.compile(f"^{label}$"))
    )


def slider(cell, label):
    # ipywidgets does not tie a slider's label to its handle: by role alone it has no name.
    return cell.locator(".widget-slider", has_text=re.compile(rf"^{label}\s*[\d.]+$")).get_by_role("slider")


def dropdown(cell, label):
    return cell.get_by_label(label, exact=True)


def tab_to(control):
    """Press Tab until the control has the focus."""
    for _ in range(30):
        if control.evaluate("e => e === document.activeElement"):
            return
        control.page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {control}")


def press(control, *keys):
    tab_to(control)
    for key in keys:
        control.page.keyboard.press(key)


def picture(cell):
    """Bytes of the picture shown, as a data URL, when it is one that a browser can draw."""
    shown = cell.locator(".jp-OutputArea img")
    cell.page.wait_for_function("e => e.complete && e.naturalWidth > 200", arg=shown.element_handle())
    return shown.get_attribute("src")


def changed(cell, before):
    """The picture that takes the place of another."""
    from playwright.sync_api import expect

    expect(cell.locator(".jp-OutputArea img")).not_to_have_attribute("src", before)
    return picture(cell)


def test_controls_redraw_the_heatmap_and_the_last_picture_stays(lab):
    from playwright.sync_api import expect

    with window(lab, "01_similarity.ipynb") as page:
        run_all(page)
        cell = explorer(page, "linkage")
        first = picture(cell)
        cell.locator(".jp-InputPrompt").click()  # from here on by keyboard alone
        press(slider(cell, "layer"), "ArrowRight")
        second = changed(cell, first)
        expect(slider(cell, "layer")).to_have_attribute("aria-valuetext", "1")
        # While a list is closed JupyterLab takes arrows and letters for itself: open it, go down, choose.
        press(dropdown(cell, "linkage"), "Space", "ArrowDown", "Enter")
        expect(dropdown(cell, "linkage")).to_have_value("complete")
        third = changed(cell, second)
        assert len({first, second, third}) == 3
        tokens = explorer(page, "expert")
        picture_before, numbers_before = picture(tokens), tokens.get_by_role("table").inner_text()
        press(slider(tokens, "expert"), "ArrowRight", "ArrowRight")
        changed(tokens, picture_before)
        expect(tokens.get_by_role("table")).not_to_have_text(numbers_before, use_inner_text=True)
        save(page)
        pictures = page.locator(".jp-OutputArea img").count()
    with window(lab, "01_similarity.ipynb") as page:
        cell = explorer(page, "linkage")
        assert picture(cell) == third
        expect(slider(cell, "layer")).to_have_attribute("aria-valuetext", "1")
        expect(dropdown(cell, "linkage")).to_have_value("complete")
        expect(page.locator(".jp-OutputArea img")).to_have_count(pictures)
        expect(page.get_by_text("Error displaying widget")).to_have_count(0)


def test_a_cut_drawn_in_the_notebook_is_merged_by_the_command(lab):
    from playwright.sync_api import expect

    with window(lab, "02_dendrograms.ipynb") as page:
        run_all(page)
        cell = explorer(page, "experts kept here")
        before, kept = picture(cell), EXPERTS // 2
        expect(cell).to_contain_text(f"{LAYERS * kept} experts")
        cell.locator(".jp-InputPrompt").click()
        press(slider(cell, "layer"), "ArrowRight")
        before = changed(cell, before)
        press(dropdown(cell, "linkage"), "Space", "w", "Enter")
        before = changed(cell, before)
        height = slider(cell, "relative cut height").get_attribute("aria-valuetext")
        press(slider(cell, "experts kept here"), "ArrowLeft")
        last = changed(cell, before)
        share = 100 * (1 - (kept - 1) / EXPERTS)
        note = cell.get_by_text("This layer:")
        expect(note).to_contain_text(f"{share:.0f} % of its expert weights saved")
        expect(note).to_contain_text(f"{LAYERS * kept - 1} experts")
        expect(slider(cell, "relative cut height")).not_to_have_attribute("aria-valuetext", height)
        tab_to(slider(cell, "relative cut height"))
        tab_to(cell.get_by_role("button", name="same in every layer"))
        press(cell.get_by_role("button", name="save plan"), "Enter")
        told = cell.get_by_text(re.compile("^Saved;")).inner_text()
        tab_to(cell.get_by_role("button", name="apply and score"))
        tab_to(cell.get_by_label("plan", exact=True))
        save(page)
        numbers = note.inner_text()
    with window(lab, "02_dendrograms.ipynb") as page:
        cell = explorer(page, "experts kept here")
        assert picture(cell) == last
        assert cell.get_by_text("This layer:").inner_text() == numbers
        expect(slider(cell, "experts kept here")).to_have_attribute("aria-valuetext", str(kept - 1))
        expect(page.get_by_text("Error displaying widget")).to_have_count(0)
    words = shlex.split(
        told.removeprefix("Saved; hcsmoe").replace("MODEL", "demo-qwen").replace("FOLDER", "merged")
    )
    subprocess.run([sys.executable, "-m", "hcsmoe_core.ui.cli", *words], check=True, cwd=lab.folder)
    plan = core.load_plan(words[words.index("--plan") + 1])
    assert plan.settings["linkage"] == "ward"
    stored = [layer.num_stored for layer in core.find_moe_layers(core.load_merged(lab.folder / "merged"))]
    assert stored == [kept, kept - 1, *[kept] * (LAYERS - 2)]


def test_a_notebook_that_papermill_ran_shows_its_pictures_unrun(lab):
    cell = runner.notebook_cell(
        sweep.notebook_path("01_similarity"),
        SMALL | {"figures": str(lab.folder / "figures")},
        lab.notebooks / "papermill",
    )
    done = runner.complete(cell)
    with window(lab, f"papermill/{done.name}") as page:
        shown = page.locator(".jp-OutputArea img")
        shown.first.wait_for()
        assert shown.count() == sum("image/png" in o.get("data", {}) for o in _outputs(done))
        # Nobody has trusted the notebook, so that JupyterLab shows the controls' text.
        assert page.get_by_text("layer: 0, similarity: expert-output, linkage: average").is_visible()


def _outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        yield from cell.get("outputs", [])
