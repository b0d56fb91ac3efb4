"""The job store: one module per stage of a job's life, one function per transition.

The order of a life: ``submit`` -> ``snapshot`` -> ``dispatch`` -> ``claim`` -> ``report`` -> ``finish``;
besides: ``cancel``, ``rescue``, ``devices``, ``leader``, ``keys``, ``read``. Every function takes a
session and is called through ``Store.call``. Writes of workers are fenced by ``guard``.
"""

from shared.store.engine import Listener, Store
from shared.store.guard import Holder

__all__ = ["Holder", "Listener", "Store"]
