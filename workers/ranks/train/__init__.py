"""The training rank: fine-tunes a text classifier with DDP, and resumes exactly.

Read ``entry.py`` first (the life of a rank), then ``loop.py`` (the steps). Everything random is a
function of the seed and of where in the training it happens (``order.py``), so that a checkpoint
needs no generator or loader state.
"""

from workers.ranks.train.entry import main

__all__ = ["main"]
