"""Step 1 of a job's life, before its row: everything that can be known to be wrong is said now.

``paths`` decides what may be read, ``models`` looks a model folder over (without torch), ``data``
reads training data row by row, ``rows`` cuts the input of a batch job, ``requirements`` says what each
device must have, and ``submit`` puts them in order and inserts the job; ``sweep`` does so for many at
once, ``retry`` for one that was there before.
"""

from scheduler.submission.retry import retry
from scheduler.submission.submit import submit
from scheduler.submission.sweep import submit_sweep

__all__ = ["retry", "submit", "submit_sweep"]
