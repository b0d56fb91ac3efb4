"""The device's warm inference engine: a process that keeps models loaded and computes rows.

In reading order: ``process`` (messages), ``attempt`` (shards), ``inputs`` and ``prompts`` (a line becomes
tokens), ``generation`` over ``runners`` and ``slots``, ``classification`` over ``batching``, ``models``.
"""

from workers.ranks.engine.process import main

__all__ = ["main"]
