"""/api/docs in a real Chromium: Swagger UI works under the page's policy and asks nobody else."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import CHROMIUM, CHROMIUM_FLAGS, Running, missing

playwright_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.live]


def test_the_page_shows_every_operation_and_loads_nothing_from_elsewhere(running: Running) -> None:
    if not Path(CHROMIUM).exists():
        missing("Chromium")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=False, args=CHROMIUM_FLAGS, chromium_sandbox=False
        )
        page = browser.new_page()
        wrong: list[str] = []
        hosts: set[str] = set()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(f"{running.url}/api/docs")
        playwright_api.expect(page.locator(".opblock-summary-path").first).to_be_visible(timeout=30_000)
        shown = page.locator(".opblock").count()
        described = page.evaluate(
            "fetch('/api/schema').then(r => r.json()).then(d => "
            "Object.values(d.paths).flatMap(p => Object.keys(p)).length)"
        )
        browser.close()
    assert shown == described
    assert wrong == []
    assert hosts - {""} == {running.domain}
