"""Measuring how much memory a training takes, without weights: a rank of its own kind.

``measure`` is the question, ``subject`` what it is about, ``step`` what is done with it, ``pretend`` the
tensors without memory, and ``tracker`` what counts them.
"""

from __future__ import annotations

import os
import time
import traceback

from shared.lifecycle import FailureClass
from shared.messages import Failed, Measure, Measured
from workers.channel import Channel, ChannelClosed

_ASSIGNMENT_SECONDS = 60.0
_NICE = 10
"""Trainings on this host come first."""


def main(channel: Channel[object]) -> int:
    """Answer one question; the exit code."""
    os.nice(_NICE)
    try:
        asked = channel.receive(_ASSIGNMENT_SECONDS)
        if not isinstance(asked, Measure):
            return 1
        channel.send(_answer(asked))
    except ChannelClosed:
        return 1
    return 0


def _answer(asked: Measure) -> Measured | Failed:
    # Imported here: fake tensors bring a second of imports, which no other rank needs.
    import torch

    from workers.ranks.footprint.measure import measure

    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        found = measure(asked.configuration)
    except Exception as error:
        traceback.print_exc()
        return Failed(
            attempt_id="",
            failure_class=FailureClass.INFRASTRUCTURE,
            code="not_measurable",
            message=f"{type(error).__name__}: {error}"[:500],
        )
    return Measured(bytes=found, seconds=time.monotonic() - began)
