"""A learner in a browser: a lesson runs, its slider moves; a mistake is named, a hint given, a right answer passes.

Set MINILORA_SCREENSHOTS to a folder to keep the pictures that are taken on the light and the dark theme.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
NOTEBOOK = "03_lora_in_numpy.ipynb"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1300,1500",
]
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page
}


def needed(*names: str) -> str:
    """The first of these programs that is installed; without any, a failure under CI and a hint elsewhere."""
    for name in names:
        if found := shutil.which(name):
            return found
    message = f"this test needs {names[0]}: apt-get install chromium chromium-driver"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab of our own on a copy of the notebooks, with its token."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name, value in SETTINGS.items():
        path = tmp_path / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.allow_root": True,
        "ServerApp.open_browser": False,
        "ServerApp.root_dir": tmp_path / "notebooks",
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
        "LabApp.user_settings_dir": tmp_path / "settings",
        "LabApp.workspaces_dir": tmp_path / "workspaces",
    }
    folders = {
        name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    log = (tmp_path / "lab.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())],
        cwd=tmp_path,
        env={
            **os.environ,
            **folders,
            "MINILORA_HOME": str(tmp_path / "learner"),
            "MINILORA_LESSONS": str(ROOT / "lessons"),
            "PYTHONPATH": str(ROOT),
        },
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        await_answer(f"{address}/api/status?token={token}", server, tmp_path / "lab.log")
        yield f"{address}/lab/tree/{NOTEBOOK}?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def await_answer(address: str, server: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not answer:\n{log.read_text()[-3000:]}")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """Headless Chromium with a profile of its own."""
    options = Options()
    options.binary_location = needed("chromium", "chromium-browser", "google-chrome")
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(needed("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait(browser: webdriver.Chrome, seconds: float, what: str, condition: Callable[[], Any]) -> Any:
    """The first true value of the condition."""
    return WebDriverWait(browser, seconds, ignored_exceptions=[Exception]).until(lambda _: condition(), message=what)


def cell_with(browser: webdriver.Chrome, text: str, *, exact: bool = False) -> WebElement:
    """The code cell whose source contains this text, or is just this text."""
    cells = browser.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-CodeCell")
    sources = [(each.find_element(By.CSS_SELECTOR, ".cm-content").text.strip(), each) for each in cells]
    (cell,) = [each for source, each in sources if (text == source if exact else text in source)]
    return cell


def screenshot(browser: webdriver.Chrome, at: WebElement, name: str, folder: Path) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'start'})", at)
    time.sleep(1)
    kept = Path(os.environ.get("MINILORA_SCREENSHOTS") or folder)
    kept.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(kept / f"{name}.png"))


def test_a_lesson_is_opened_run_and_its_slider_moved(lab: str, browser: webdriver.Chrome, tmp_path: Path):
    browser.get(lab)
    wait(browser, 120, "the notebook", lambda: cell_with(browser, "picture = explorer("))
    explorer = cell_with(browser, "picture = explorer(")
    picture = lambda: explorer.find_element(By.CSS_SELECTOR, ".jp-RenderedImage img")  # noqa: E731
    words = lambda: explorer.find_element(By.CSS_SELECTOR, ".jp-RenderedMarkdown").text  # noqa: E731
    assert picture().get_attribute("src").startswith("data:image/png"), "the first frame is there before anything runs"
    assert not explorer.find_elements(By.CSS_SELECTOR, ".noUi-handle")

    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    handle = wait(browser, 240, "the slider", lambda: explorer.find_elements(By.CSS_SELECTOR, ".noUi-handle"))[0]
    wait(browser, 60, "the first frame", lambda: "r = 16, d = 4,096" in words())
    before = picture().get_attribute("src")
    assert picture().size["width"] > 500

    handle.send_keys(Keys.ARROW_RIGHT)

    wait(browser, 60, "another finding", lambda: "r = 32, d = 4,096" in words())
    wait(browser, 60, "another picture", lambda: picture().get_attribute("src") != before)
    last = cell_with(browser, "and the layers' outputs by less than")
    wait(browser, 240, "the last cell", lambda: "[ ]" not in (n := prompt(last)) and "*" not in n)
    assert not browser.find_elements(By.CSS_SELECTOR, "[data-mime-type='application/vnd.jupyter.error']")
    screenshot(browser, explorer, "lab_light", tmp_path)

    browser.execute_script("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    wait(browser, 30, "the dark theme", lambda: browser.find_elements(By.CSS_SELECTOR, "[data-jp-theme-light='false']"))
    screenshot(browser, explorer, "lab_dark", tmp_path)


def test_a_learner_errs_is_told_why_takes_a_hint_and_passes(lab: str, browser: webdriver.Chrome, tmp_path: Path):
    browser.get(lab.replace("/tree/", "/tree/student/"))
    blank = wait(browser, 120, "the blank", lambda: cell_with(browser, "def lora_forward("))
    said = lambda: blank.find_element(By.CSS_SELECTOR, ".jp-OutputArea").text  # noqa: E731
    run(browser, cell_with(browser, "import importlib.util"))
    run(browser, blank)
    wait(browser, 120, "a stub is no mistake", lambda: "03.1  The forward pass: not started (8 minutes)" in said())

    answer(browser, blank, "your code", "return x @ W.T + (x @ A.T) @ B.T")
    run(browser, blank)
    wait(browser, 60, "the mistake's name", lambda: "looks like  no scaling: You left out alpha / r" in said())
    assert "✗  03.1  The forward pass: not yet" in said()
    screenshot(browser, blank, "learner_wrong", tmp_path)

    type_below(browser, 'hint("03.1")')
    asked = wait(browser, 60, "the new cell", lambda: cell_with(browser, 'hint("03.1")', exact=True))
    wait(browser, 60, "a hint", lambda: "Hint 1 of 3 for 03.1: Write the shapes under the letters" in asked.text)

    answer(browser, blank, "return x", "return x @ W.T + (alpha / len(A)) * (x @ A.T) @ B.T")
    run(browser, blank)
    wait(browser, 60, "it passes", lambda: "✓  03.1  The forward pass: 5 checks passed" in said())
    assert "The lesson goes on with your function." in said()
    screenshot(browser, blank, "learner_right", tmp_path)

    environment = {**os.environ, "MINILORA_HOME": str(tmp_path / "learner"), "MINILORA_LESSONS": str(ROOT / "lessons")}
    command = [sys.executable, "-m", "minilora.cli", "progress"]
    told = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in told.splitlines() if " 03.1 " in line]
    assert " ".join(line.split()) == "✓ 03.1 The forward pass passed, 3 attempts, 1 of 3 hints"


def run(browser: webdriver.Chrome, cell: WebElement) -> None:
    """Click into a cell and press Ctrl+Enter."""
    editor = cell.find_element(By.CSS_SELECTOR, ".cm-content")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", editor)
    ActionChains(browser).click(editor).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()


def answer(browser: webdriver.Chrome, cell: WebElement, over: str, text: str) -> None:
    """Type over the line of a cell that holds these words; its indentation stays."""
    lines = cell.find_elements(By.CSS_SELECTOR, ".cm-line")
    (line,) = [each for each in lines if over in each.text]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", line)
    keys = ActionChains(browser).click(line).send_keys(Keys.END)
    keys.key_down(Keys.SHIFT).send_keys(Keys.HOME).key_up(Keys.SHIFT).send_keys(text).perform()


def type_below(browser: webdriver.Chrome, text: str) -> None:
    """A new cell below the one that was run, with this text, and run it."""
    keys = ActionChains(browser).send_keys("b").send_keys(Keys.ENTER).pause(0.5).send_keys(text)
    keys.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()


def prompt(cell: WebElement) -> str:
    """Such as "[12]:", or "[*]:" while the cell waits or runs."""
    return cell.find_element(By.CSS_SELECTOR, ".jp-InputPrompt").text
