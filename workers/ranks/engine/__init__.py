"""The device's warm inference engine: a process that keeps models loaded and computes rows.

In reading order: ``process`` (messages), ``attempt`` (shards), ``inputs``, ``prompts`` and ``words`` (a line
becomes tokens), ``tasks`` (which computation), then the computations. Encoders: ``passes`` over ``batching``
and ``fused`` with ``classification``, ``tagging`` and ``entities``, ``masks``, ``embeddings``, ``reranking``; in
the same way ``scoring``. Writing: ``generating`` (with ``constraints``), ``generation`` over ``runners``, ``slots``
and ``prefixes``, ``text2text`` over ``crossing`` (with ``dense`` and ``positions``), ``groups`` over ``lockstep``.
Last ``models`` (with ``bases``) and ``families``.
"""

from workers.ranks.engine.process import main

__all__ = ["main"]
