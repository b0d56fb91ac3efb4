"""The documentation page: for a browser that reaches this service and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from scheduler.api import examples
from shared.specs import parse_spec
from shared.views import JobDetail
from tests.api.conftest import Api, error_of


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("CI"):
        pytest.fail("no chromium: CI has to have it (apt-get install -y chromium)")
    pytest.skip("no chromium here (apt-get install -y chromium)")


def rendered(browser: str, url: str, folder: Path) -> tuple[str, str]:
    """(the document once its scripts have run, what the browser's console said). Everything that is
    not on the loopback goes to a proxy that is not there."""
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={folder}", "--proxy-server=127.0.0.1:9", "--enable-logging=stderr",
            "--virtual-time-budget=30000", "--dump-dom", url,
        ],
        env={**os.environ, "HOME": str(folder)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


def test_a_browser_without_a_network_shows_every_operation(
    browser: str, api: Api, tmp_path: Path
) -> None:
    document: dict[str, Any] = httpx.get(f"{api.url}/openapi.json").json()
    page, console = rendered(browser, f"{api.url}/docs", tmp_path)
    assert console == "", "nothing was missing and nothing was against the policy"
    # Swagger UI lets paths break at their slashes.
    text = re.sub(r"<[^>]+>", "", page.replace("<wbr>", "")).replace("\u200b", "")
    for path, operations in document["paths"].items():
        assert path in text
        for operation in operations.values():
            assert operation["summary"] in text
    assert "Authorize" in text


def test_the_page_is_whole_without_a_key_and_talks_to_nobody_else(api: Api) -> None:
    with httpx.Client(base_url=api.url) as client:
        page = client.get("/docs")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "http" not in policy
        assert "script-src 'self' 'sha256-" in policy
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(sources) == 3
        for source in sources:
            assert source.startswith(("data:", "docs/assets/")), source
            if not source.startswith("data:"):
                assert client.get(f"/{source}").status_code == 200
        assert '"persistAuthorization": true' in page.text
        assert client.get("/openapi.json").status_code == 200
        error_of(client.get("/redoc"), 404, "not_found")
        error_of(client.get("/docs/assets/none.js"), 404, "not_found")
        assert client.get("/", follow_redirects=False).headers["location"] == "/docs"


def test_the_documentation_shows_what_is_right(client: httpx.Client) -> None:
    shown = examples.JOB_BODY["content"]["application/json"]["examples"]
    assert len(shown) > 5
    for example in shown.values():
        parse_spec(example["value"])
    job = JobDetail(**examples.JOB)
    assert job.model_dump(mode="json", exclude_unset=True).keys() == examples.JOB.keys()
    assert parse_spec(examples.JOB["spec"]).model_dump(mode="json") == examples.JOB["spec"]
    document = client.get("/openapi.json").json()
    assert list(document["components"]["securitySchemes"]) == ["api_key"]
    schemas = document["components"]["schemas"]
    assert schemas["TrainSpec"]["properties"]["hyperparameters"]
    for reference in re.findall(r'#/components/schemas/([^"]+)"', client.get("/openapi.json").text):
        assert reference in schemas, f"{reference} is referred to and not there"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"] and operation["tags"], (method, path)
            refusals = {s: r for s, r in operation["responses"].items() if s.startswith("4")}
            assert refusals or path in ("/healthz", "/readyz"), (method, path)
            for status, refusal in refusals.items():
                content = refusal["content"]["application/json"]
                assert "ErrorEnvelope" in content["schema"]["$ref"], (method, path, status)
                assert content["example"]["error"]["message"], (method, path, status)
