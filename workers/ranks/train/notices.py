"""What a user should know about the data and would not see in the result. Told once a training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from workers.ranks.loading import known_labels
from workers.ranks.train.examples import Examples
from workers.ranks.train.reports import Reporter
from workers.ranks.train.tasks import Task

_NO_NAME = re.compile(r"LABEL_\d+")
"""What Transformers calls a class that nobody has named."""


def tell_about_data(
    task: Task,
    model_path: Path,
    training: Examples,
    validation: Examples | None,
    reporter: Reporter,
) -> None:
    """Notices of texts that were cut, and of labels that the model knows and training lacks."""
    limit = task.loaded.max_length
    for name, examples in (("training", training), ("validation", validation)):
        cut = int(examples.cut.sum()) if examples is not None else 0
        if examples is not None and cut:
            reporter.notice(
                "texts_cut",
                f"{cut:,} of {len(examples):,} {name} examples are longer than {limit:,} tokens and "
                "were cut",
                data=name,
                cut=cut,
                examples=len(examples),
                limit=limit,
            )
    if task.loaded.labels:
        lacking = empty_classes(known_labels(model_path) or (), task.loaded.labels)
        if lacking:
            shown = ", ".join(f"'{label}'" for label in lacking)
            reporter.notice(
                "empty_class",
                f"the model that training starts from knows {shown}, and no row of the training data "
                "has that label: what is trained will not know it",
                labels=list(lacking),
            )


def empty_classes(known: Sequence[str], found: Sequence[str]) -> tuple[str, ...]:
    """The labels of a model that training data lack. None where the two have nothing in common: then
    the model was made for something else."""
    if not set(known) & set(found):
        return ()
    return tuple(label for label in known if label not in found and not _NO_NAME.fullmatch(label))
