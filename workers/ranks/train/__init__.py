"""The training rank: fine-tunes a model with DDP, and resumes exactly.

Read ``entry.py`` first (the life of a rank), then ``loop.py`` (the steps). What a model is trained for
is behind one seam, ``tasks/base.py``. Everything random is a function of the seed and of where in the
training it happens (``order.py``), so that a checkpoint needs no generator or loader state.
"""

from workers.ranks.train.entry import main

__all__ = ["main"]
