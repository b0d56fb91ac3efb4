"""The command line: ``gpuyard …``. ``main`` runs it; each module holds the commands of one theme."""

from gpuyard.cli.app import main

__all__ = ["main"]
