"""What the browser tests share: one JupyterLab, one Chromium, a fresh page for each test."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from jupyterlab_page import JupyterLabPage
    from playwright.sync_api import Browser

pytest.register_assert_rewrite("jupyterlab_page")  # its assertions say what they compared

REPO = Path(__file__).parents[2]
ARTEFACTS = REPO / "build" / "browser"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# The page of a test needs no GPU, and nothing from outside this machine.
CHROMIUM_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# JupyterLab would ask at its first start whether it may look for news.
SETTINGS = {"fetchNews": "false", "checkForUpdates": False}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "browser" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason="run make test-browser"))


@dataclass(frozen=True)
class JupyterLab:
    """A running JupyterLab; `folder` holds its notebooks."""

    url: str
    token: str
    pid: int
    folder: Path
    temporary: Path

    def processes(self) -> list[str]:
        """The command lines of all it started, directly or not: kernels, controllers, ranks."""
        found = []
        for process in psutil.process_iter():
            try:
                inherited = process.environ().get("TMPDIR") == str(self.temporary)
                if inherited and process.pid != self.pid:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:  # ended, a zombie, or another user's
                continue
        return found

    def wait_until_alone(self, limit: float) -> None:
        end = time.monotonic() + limit
        while left := self.processes():
            assert time.monotonic() < end, f"still there after {limit} s: {left}"
            time.sleep(0.1)

    def shut_kernels_down(self) -> None:
        for kernel in json.loads(self._ask("GET", "api/kernels")):
            self._ask("DELETE", f"api/kernels/{kernel['id']}")

    def _ask(self, method: str, path: str) -> bytes:
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            return content


@pytest.fixture(scope="session")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterLab]:
    """JupyterLab of this environment, with copies of the notebooks and nobody's settings."""
    shutil.rmtree(ARTEFACTS, ignore_errors=True)
    ARTEFACTS.mkdir(parents=True)
    home = tmp_path_factory.mktemp("jupyter")
    folder, temporary, runtime = home / "notebooks", home / "tmp", home / "runtime"
    temporary.mkdir()
    shutil.copytree(REPO / "notebooks", folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(SETTINGS))
    # The engines' socket and file names would differ from a user's under pytest's variables.
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name} | {
        "TMPDIR": str(temporary),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]
    log = ARTEFACTS / "jupyterlab.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = _url(process, runtime, log)
        lab = JupyterLab(url, token, process.pid, folder, temporary)
        yield lab
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
    lab.wait_until_alone(10)


def _url(process: subprocess.Popen[bytes], runtime: Path, log: Path) -> str:
    """Where it listens, once it does: it chose a free port."""
    end = time.monotonic() + 60  # 2 s on an idle machine
    while time.monotonic() < end and process.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            if content := path.read_text():
                return str(json.loads(content)["url"])
        time.sleep(0.1)
    pytest.fail(f"JupyterLab did not start; its last words:\n{log.read_text()[-2000:]}", False)


@pytest.fixture(scope="session")
def chromium() -> "Iterator[Browser]":
    """Chromium of this machine, without a window and with an empty profile."""
    # Here, because `make test` collects this file where playwright is not installed.
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.fail(
            f"no Chromium on this machine (looked for {', '.join(CHROMIUM)}). "
            "On Debian: sudo apt install chromium",
            pytrace=False,
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(
    jupyterlab: JupyterLab, chromium: "Browser", request: pytest.FixtureRequest
) -> "Iterator[JupyterLabPage]":
    """A page of a browser that was never used; a failed test leaves a last screenshot."""
    from jupyterlab_page import JupyterLabPage

    folder = ARTEFACTS / re.sub(r"\W+", "_", request.node.name)
    folder.mkdir(parents=True)
    failed_before = request.session.testsfailed
    with chromium.new_context(viewport={"width": 1280, "height": 1200}) as context:
        page = JupyterLabPage(context.new_page(), jupyterlab.url, jupyterlab.token, folder)
        try:
            yield page
            if request.session.testsfailed > failed_before:
                page.screenshot("failed")
        finally:
            page.write_log()
    jupyterlab.shut_kernels_down()
    jupyterlab.wait_until_alone(10)
    assert page.requests_outside == [], "the page asked another machine for something"
