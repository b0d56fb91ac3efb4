"""The best models of a training whose checkpoints are written slowly: held, replaced, and not lost."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.messages import CheckpointRef, CheckpointWritten, FromRank, ToRank
from shared.specs import Checkpointing
from workers.channel import Channel
from workers.ranks.checkpoint import Written, finish, read_state, read_tensors
from workers.ranks.train import writing
from workers.ranks.train.device import Compute
from workers.ranks.train.gang import Gang
from workers.ranks.train.reports import Reporter
from workers.ranks.train.saving import Saver
from workers.ranks.train.state import Position
from workers.ranks.train.stopping import best_of

DEADLINE = 60.0


class Training:
    """A training of one rank, of a model whose weights say at which step they are."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()

        def finish_at_the_gate(*arguments: Any) -> Written:
            self.begun.set()
            assert self.gate.wait(DEADLINE)
            return finish(*arguments)

        monkeypatch.setattr(writing, "finish", finish_at_the_gate)
        ours, theirs = socket.socketpair()
        self.channel: Channel[Any] = Channel(theirs, FromRank)
        self.model = nn.Linear(3, 2)
        self.position = Position()
        self.saver = Saver(
            rules=Checkpointing(every_seconds=None),
            best_model=lambda place: best_of(place.evaluations, "score", lambda a, b: a > b),
            model=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1),
            fingerprint={},
            compute=Compute(device=torch.device("cpu"), backend="gloo", half=None),
            gang=Gang(0, 1, torch.device("cpu")),
            reporter=Reporter(Channel(ours, ToRank)),
            folder=folder,
            best=None,
            device_mtbf=1e6,
        )

    def step(self, score: float | None = None) -> None:
        """One step, and an evaluation that comes to ``score``; saves what is due."""
        wish = self.saver.wish()
        self.position.step += 1
        with torch.no_grad():
            self.model.weight.fill_(self.position.step)
        self.saver.after_step(0.01, wish)
        if score is not None:
            self.position.evaluations.append({"step": self.position.step, "score": score})
        if self.saver.due(self.position):
            self.saver.save(self.position)

    def written(self) -> list[tuple[int, int | None]]:
        """Steps, and the best step of each, of the checkpoints reported; each holds what it should."""
        found = []
        while (report := self.channel.receive(0)) is not None:
            assert isinstance(report, CheckpointWritten)
            ref = CheckpointRef(
                id="x", step=report.step, path=report.path, manifest=report.manifest
            )
            position = read_state(ref)["position"]
            assert position["step"] == report.step
            assert position["evaluations"][-1]["step"] <= report.step
            assert bool((read_tensors(ref)["parameter.weight"] == report.step).all())
            found.append((report.step, report.best_step))
        return found


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    made = Training(tmp_path, monkeypatch)
    yield made
    made.gate.set()
    made.channel.close()


def test_training_does_not_wait_and_only_the_newest_best_counts(training: Training) -> None:
    training.step(score=1)
    assert training.begun.wait(DEADLINE)
    for score in (2, 3, 2.5, 4):  # none of these returns if it waits for the first
        training.step(score)
    training.gate.set()
    training.saver.close()
    assert training.written() == [(1, 1), (5, 5)]
    assert training.saver.best is not None and training.saver.best.step == 5


def test_what_is_held_is_written_as_soon_as_it_can_be(training: Training) -> None:
    training.step(score=1)
    assert training.begun.wait(DEADLINE)
    training.step(score=2)
    training.gate.set()
    training.begun.clear()
    while not training.begun.is_set():  # once the first is written, the next step begins with it
        training.step()
    training.saver.close()
    assert training.written() == [(1, 1), (2, 2)]


def test_a_checkpoint_that_builds_on_the_held_one_comes_behind_it(training: Training) -> None:
    training.step(score=1)
    assert training.begun.wait(DEADLINE)
    training.step(score=2)
    training.step()
    training.gate.set()
    training.saver.save_and_wait(training.position)
    assert training.written() == [(1, 1), (2, 2), (3, 2)]


def test_leaving_at_the_step_of_the_held_one_needs_no_other(training: Training) -> None:
    training.step(score=1)
    assert training.begun.wait(DEADLINE)
    training.step(score=2)
    training.gate.set()
    training.saver.save_and_wait(training.position)
    assert training.written() == [(1, 1), (2, 2)]
