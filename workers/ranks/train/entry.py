"""The life of a training rank, in reading order: meet, read, load, resume, train, deliver."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from shared.lifecycle import FailureClass
from shared.messages import Done, Failed, Ready, TrainAssignment
from shared.specs import TrainSpec
from workers.ranks.loading import LoadError
from workers.ranks.train.compiling import compile_layers
from workers.ranks.train.datasets import forget_datasets, write_out_datasets
from workers.ranks.train.device import Compute, open_device
from workers.ranks.train.distillation import Distillation, distil
from workers.ranks.train.ending import Ending, take_samples
from workers.ranks.train.examples import Examples
from workers.ranks.train.failures import Preempted, Stopped, TrainingFailed, explain
from workers.ranks.train.freezing import freeze
from workers.ranks.train.gang import Gang, join
from workers.ranks.train.health.health import Health
from workers.ranks.train.labels import share_labels
from workers.ranks.train.loop import Trainer
from workers.ranks.train.notices import tell_about_data
from workers.ranks.train.optimizer import make_optimizer
from workers.ranks.train.order import BatchPlan, Indices, plan_batches
from workers.ranks.train.parallel import Parallel, set_aside_unused, warm_up_batch
from workers.ranks.train.reading import read_data, training_file
from workers.ranks.train.recompute import recompute_layers
from workers.ranks.train.reference import add_reference
from workers.ranks.train.reports import RankChannel, Reporter
from workers.ranks.train.saving import best_model
from workers.ranks.train.schedule import Schedule, make_schedule
from workers.ranks.train.scratch import begin_from_scratch
from workers.ranks.train.state import (
    Position,
    Resumed,
    fingerprint,
    require_agreement,
    resume,
    sample_weights,
)
from workers.ranks.train.stopping import best_of
from workers.ranks.train.tasks import Task, open_task
from workers.ranks.train.tasks.base import Evaluation, Objective
from workers.ranks.train.tasks.preferences import Preferences
from workers.ranks.train.tracking import Tracking

if TYPE_CHECKING:
    from workers.ranks.train.lora import Adapter

SUCCEEDED, FAILED, STOPPED = 0, 1, 3
"""Exit codes. ``STOPPED``: the worker ordered it, or is gone."""
_FORESEEN = frozenset({"peer_lost", "disk_full", "out_of_memory"})
"""What ends a rank from outside, or in a library: a traceback would say nothing of it."""


def main(channel: RankChannel) -> int:
    """Run one rank of one attempt at a training job; returns its exit code.

    Every end but ``STOPPED`` is reported on the channel, as ``Done`` or as ``Failed``.
    """
    reporter = Reporter(channel)
    assignment: TrainAssignment | None = None
    ok = False
    try:
        assignment = reporter.receive_assignment()
        _run(assignment, reporter)
        ok = True
    except Stopped as order:
        reporter.say(f"stopped: {order}")
        return STOPPED
    except Preempted as end:
        assert assignment is not None  # noqa: S101  it has been running
        return _leave(reporter, assignment, end)
    except BaseException as error:
        return _fail(reporter, assignment.attempt_id if assignment else "", error)
    finally:
        if reporter.tracking is not None and not ok:
            reporter.tracking.close(ok=False)
        if assignment is not None:
            forget_datasets(assignment)
    return SUCCEEDED


def _run(assignment: TrainAssignment, reporter: Reporter) -> None:
    spec, options = assignment.spec, assignment.spec.hyperparameters
    compute = open_device(assignment.device, options.precision)
    gang = join(assignment, compute, reporter)
    parallel = Parallel(compute, gang)

    began = time.monotonic()
    assignment = write_out_datasets(assignment, gang, reporter)
    model_path = Path(assignment.model_path)
    if spec.architecture is not None:
        model_path = begin_from_scratch(assignment, gang, reporter)
    labels = share_labels(assignment, gang, reporter)
    with parallel.loading(reporter.say):
        task = open_task(spec, model_path, training_file(assignment), labels)
    training, validation, rows = read_data(assignment, task, gang, reporter)
    plan, schedule = _plan(assignment, len(training))
    model = task.loaded.model
    _require_fitting_tokenizer(task, training, validation)

    parallel.place(model)
    reporter.rows_at_once = min(plan.micro_batch, -(-len(training) // plan.ranks))
    adapter = None
    if spec.method == "lora":
        adapter = _add_lora(task, spec)
    frozen = freeze(model, options.freeze)
    if options.gradient_checkpointing:
        recompute_layers(model)
    name = f"{model_path.name}: {type(model).__name__}"
    parallel.divide(model)
    sampled = sample_weights(model, gang)
    if isinstance(task, Preferences):
        training, validation = add_reference(
            assignment, task, training, validation, compute, gang, parallel, reporter
        )
    objective = _objective(assignment, task, rows, compute, reporter)
    warm_up = warm_up_batch(objective, training, plan, compute)
    unused = set_aside_unused(objective, model, warm_up, compute)
    if options.compile:
        parallel.compiled = compile_layers(
            assignment,
            objective,
            [model, *([objective.teacher] if isinstance(objective, Distillation) else [])],
            training,
            plan,
            compute,
            gang,
            reporter,
        )
    optimizer = make_optimizer(model, options)
    own = fingerprint(spec, training.digest(), model, sampled)
    require_agreement(gang, own)
    _say_what(reporter, name, assignment, task, compute, frozen, unused)
    _say_how_much(reporter, training, validation, task, plan)

    resumed = resume(
        assignment, model, optimizer, own, gang, reporter, lambda place: best_model(task, place)
    )
    position = resumed.position if resumed else Position()
    if resumed:
        reporter.say(
            f"resumed from the checkpoint of step {position.step}: "
            f"{plan.total_steps - position.step} steps to go"
        )
        _tell_of_compiled(options.compile, parallel, position, gang, reporter)
    elif gang.rank == 0:
        tell_about_data(task, model_path, training, validation, reporter)
    position.attempts.append(
        {
            "number": assignment.attempt,
            "step": position.step,
            "ranks": assignment.world_size,
            "device": assignment.device.id,
            "compiled": parallel.compiled is not None,
        }
    )
    health = Health(assignment, gang, reporter)
    trainer = Trainer(
        spec=spec,
        task=task,
        objective=objective,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        plan=plan,
        training=training,
        validation=validation,
        compute=compute,
        gang=gang,
        parallel=parallel,
        reporter=reporter,
        checkpoints=Path(assignment.work_dir) / "checkpoints",
        fingerprint=own,
        best=resumed.best if resumed else None,
        device_mtbf=assignment.device_mtbf,
        health=health,
        evaluation_batch=assignment.micro_batch or max(plan.micro_batch, 16),
    )
    if gang.rank == 0 and assignment.tracking.wanted:
        reporter.tracking = Tracking(assignment, reporter)
    reporter.send(Ready(seconds=time.monotonic() - began))

    compute.watch_memory()
    first, train_began = position.step, time.monotonic()
    with health.watching():
        evaluation = trainer.run(position)
    seconds = time.monotonic() - train_began
    if parallel.compiled is not None:
        parallel.compiled.undo()
        parallel.compiled = None
    samples = take_samples(task, validation, compute, gang, parallel, reporter)
    parallel.gather(model)
    gang.leave()

    summary: dict[str, Any] = {"peak_memory_bytes": compute.peak_memory()}
    if gang.rank == 0:
        summary = {
            **summary,
            **_summary(task, plan, position, evaluation, resumed, first, seconds),
            "stopped_early": trainer.stopped_early,
            "best": _best(position, task),
        }
        ending = Ending(
            assignment,
            task,
            plan,
            position,
            evaluation,
            summary,
            training,
            validation,
            compute,
            samples,
        )
        ending.deliver(adapter, reporter)
        reporter.say(f"done: {position.step} steps in {summary['seconds']:.1f} s; model written")
    if reporter.tracking is not None:
        reporter.tracking.close(ok=True)  # once it is reported, little time is left
    reporter.send(Done(attempt_id=assignment.attempt_id, summary=summary))


def _objective(
    assignment: TrainAssignment,
    task: Task,
    rows: Indices | None,
    compute: Compute,
    reporter: Reporter,
) -> Objective:
    """What is minimised: the task's own loss, unless a teacher has a say in it."""
    if assignment.teacher_path is None:
        return task
    teacher, file = Path(assignment.teacher_path), training_file(assignment)
    objective, what = distil(task, assignment.spec, teacher, file, rows)
    objective.to(compute.device)
    reporter.say(f"teacher {what}")
    return objective


def _add_lora(task: Task, spec: TrainSpec) -> Adapter:
    # Imported here: PEFT takes seconds, and most trainings do without it.
    from workers.ranks.train.lora import add_lora

    return add_lora(
        task.loaded.model,
        spec.adaptation,
        seed=spec.hyperparameters.seed,
        train_head=bool(task.loaded.labels),
    )


def _tell_of_compiled(
    wanted: bool, parallel: Parallel, position: Position, gang: Gang, reporter: Reporter
) -> None:
    """Where the host of one attempt can compile, and that of another cannot."""
    now = parallel.compiled is not None
    if wanted and gang.rank == 0 and position.attempts[-1].get("compiled") is not now:
        reporter.notice(
            "compiled_changed",
            f"the checkpoint of step {position.step} was made {'without' if now else 'with'} compiled "
            f"layers and is continued {'with' if now else 'without'} them: the result is the same but "
            "for rounding, in the last bits",
        )


def _plan(assignment: TrainAssignment, examples: int) -> tuple[BatchPlan, Schedule]:
    options, sizes = assignment.spec.hyperparameters, assignment.spec.world_sizes
    try:
        plan = plan_batches(
            examples=examples,
            ranks=assignment.world_size,
            global_batch=options.batch_size,
            micro_batch=assignment.micro_batch or sizes.micro_batch,
            widest=sizes.usable[-1] if assignment.spec.elastic else None,
            epochs=options.epochs,
            max_steps=options.max_steps,
        )
        return plan, make_schedule(options, plan.total_steps)
    except ValueError as error:
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "contradictory_hyperparameters",
            str(error),
            "Change one of the two hyperparameters.",
        ) from error


def _require_fitting_tokenizer(task: Task, training: Examples, validation: Examples | None) -> None:
    found = (training.largest_token, validation.largest_token if validation else 0)
    largest = max(*found, task.largest_token)
    known = _vocabulary(task.loaded.model)
    if largest >= known:
        raise LoadError(
            "model_unsuitable",
            f"the tokenizer made token {largest}, and the model knows {known}: they do not belong "
            "together",
        )


def _vocabulary(model: PreTrainedModel) -> int:
    """Tokens that the model has embeddings for."""
    embeddings = model.get_input_embeddings()
    return next(embeddings.parameters()).shape[0]


def _say_what(
    reporter: Reporter,
    name: str,
    assignment: TrainAssignment,
    task: Task,
    compute: Compute,
    frozen: int,
    unused: int,
) -> None:
    model = task.loaded.model
    aside = (f", {frozen:,} frozen" if frozen else "") + (f", {unused:,} unused" if unused else "")
    if assignment.spec.method == "lora":
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        aside += f", {trained:,} trained (LoRA)"
    reporter.say(
        f"model {name}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters{aside}, "
        f"{task.loaded.head}"
    )
    reporter.say(
        f"device {assignment.device.id} ({compute.device.type}), precision {compute.precision}, "
        f"{assignment.device.threads} thread(s), {assignment.world_size} rank(s)"
        + (f" over {compute.backend}" if assignment.world_size > 1 else "")
        + (", the model in shards (FSDP)" if assignment.parallelism == "fsdp" else "")
    )


def _say_how_much(
    reporter: Reporter,
    training: Examples,
    validation: Examples | None,
    task: Task,
    plan: BatchPlan,
) -> None:
    labels = f", {len(task.loaded.labels)} labels" if task.loaded.labels else ""
    reporter.say(
        f"data: {len(training):,} training and {len(validation) if validation else 0:,} validation "
        f"examples{labels}; tokens an example: median "
        f"{int(np.median(training.lengths))}, longest {int(training.lengths.max())}"
        + (f"; {training.cut.sum():,} cut to that" if training.cut.any() else "")
    )
    empty = int((training.weights == 0).sum())
    if empty:
        reporter.say(f"note: {empty:,} training examples have nothing to learn within that length")
    reporter.say(
        f"batch: {plan.ranks} ranks x {plan.micro_batch} micro-batch x {plan.accumulation} "
        f"accumulation = {plan.global_batch} global batch; {plan.steps_per_epoch} steps an epoch, "
        f"{plan.total_steps} steps in all"
        + (
            f"; the last batch of an epoch has {plan.last_batch}"
            if plan.last_batch != plan.global_batch
            else ""
        )
    )


def _summary(
    task: Task,
    plan: BatchPlan,
    position: Position,
    evaluation: Evaluation | None,
    resumed: Resumed | None,
    first: int,
    seconds: float,
) -> dict[str, Any]:
    """``seconds`` and the rate are of this attempt, ``steps`` and ``epochs`` of the whole training."""
    examples = sum(
        plan.last_batch if (step + 1) % plan.steps_per_epoch == 0 else plan.global_batch
        for step in range(first, position.step)
    )
    return {
        "steps": position.step,
        "skipped_steps": position.loss_scale.skipped,
        "epochs": position.step / plan.steps_per_epoch,
        "metrics": evaluation.values if evaluation else {},
        "objective": {
            "metric": task.judged_by,
            "goal": "maximize" if task.is_better(1.0, 0.0) else "minimize",
        },
        "seconds": round(seconds, 3),
        "examples_per_second": round(examples / max(1e-9, seconds), 3),
        "resumed_from": {"checkpoint": resumed.checkpoint.id, "step": resumed.checkpoint.step}
        if resumed
        else None,
    }


def _best(position: Position, task: Task) -> dict[str, Any] | None:
    """The best evaluation: by which metric, its value, and all that it measured."""
    best = best_of(position.evaluations, task.judged_by, task.is_better)
    if best is None:
        return None
    entry = next(each for each in position.evaluations if each["step"] == best.step)
    return {"metric": best.metric, "value": best.value, **entry}


def _leave(reporter: Reporter, assignment: TrainAssignment, end: Preempted) -> int:
    """Rank 0 reports the end of the attempt, behind its checkpoint. The others wait for the worker to
    tell them that it is over: a report of theirs could be there before the checkpoint is committed."""
    reporter.say(f"preempted: {end}")
    if assignment.rank != 0:
        reporter.wait_for_end()
        return STOPPED
    try:
        reporter.send(
            Failed(
                attempt_id=assignment.attempt_id,
                failure_class=FailureClass.PREEMPTED,
                code="preempted",
                message=f"{reporter.asked_back or 'a device of the gang was wanted back'}; {end}",
            )
        )
    except Stopped:
        return STOPPED
    return FAILED


def _fail(reporter: Reporter, attempt: str, error: BaseException) -> int:
    """Report what ended the rank. The log gets a traceback only where nobody foresaw the error."""
    failure = explain(error, reporter.rows_at_once)
    if failure.code == "peer_lost" and (order := _waiting_stop(reporter)) is not None:
        reporter.say(f"stopped: {order}")
        return STOPPED
    if not isinstance(error, TrainingFailed | LoadError) and failure.code not in _FORESEEN:
        traceback.print_exception(error)
    reporter.say(f"failed: {failure.message}" + (f" {failure.hint}" if failure.hint else ""))
    try:
        reporter.send(
            Failed(
                attempt_id=attempt,
                failure_class=failure.failure_class,
                code=failure.code,
                message=failure.message,
                hint=failure.hint,
                rows_at_once=reporter.rows_at_once
                if failure.failure_class is FailureClass.OUT_OF_MEMORY
                else None,
            )
        )
    except Stopped:
        return STOPPED
    return FAILED


def _waiting_stop(reporter: Reporter) -> Stopped | None:
    """The order to stop, if the peer is gone because the worker is ending the gang."""
    try:
        reporter.check_orders()
    except Stopped as order:
        return order
    return None
