"""Pure facts of ``shared``: the retry policy, capability classes, the table of transitions."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.capability import (
    _STEPS,
    GIB,
    KNOWN_GPUS,
    Capability,
    device_queue,
    parse_simulated,
)
from shared.errors import ConfigurationError
from shared.lifecycle import (
    ATTEMPT_TRANSITIONS,
    JOB_TRANSITIONS,
    AttemptState,
    FailureClass,
    JobState,
    attempt_may_become,
    job_may_become,
    job_states_leading_to,
)
from shared.micro_batch import rows_at_once, smaller_micro_batch
from shared.retry import MAX_BACKOFF, End, GiveUp, LessAtOnce, TryAgain, decide
from shared.specs import Retry, TrainSpec

FINAL = {
    FailureClass.USER_ERROR,
    FailureClass.DATA_ERROR,
    FailureClass.CANCELLED,
    FailureClass.DEADLINE,
}
FREE = {FailureClass.PREEMPTED, FailureClass.UNCLAIMED}
policies = st.builds(Retry, max_attempts=st.integers(1, 10), backoff_seconds=st.floats(0, 3600))
ends = st.builds(End, st.sampled_from(FailureClass), progressed=st.booleans())
histories = st.lists(ends, min_size=1, max_size=30)


@given(policy=policies, failures=histories)
def test_every_failure_has_an_answer_with_a_reason(policy: Retry, failures: list[End]) -> None:
    decision = decide(policy, failures)
    newest = failures[-1].failure_class
    assert decision.reason.startswith(newest)
    if newest in FINAL:
        assert isinstance(decision, GiveUp)
    if newest in FREE:
        assert decision == TryAgain(0.0, decision.reason)
    if isinstance(decision, TryAgain):
        assert 0 <= decision.after_seconds <= MAX_BACKOFF


@given(
    policy=policies, failures=st.lists(st.sampled_from(sorted(set(FailureClass) - FINAL - FREE)))
)
def test_a_job_that_keeps_failing_comes_to_an_end(
    policy: Retry, failures: list[FailureClass]
) -> None:
    """After exactly ``max_attempts`` counted failures, or earlier when memory runs out twice."""
    for n in range(1, len(failures) + 1):
        given_up = isinstance(decide(policy, [End(f) for f in failures[:n]]), GiveUp)
        out_of_memory = failures[:n].count(FailureClass.OUT_OF_MEMORY) >= 2
        assert given_up == (n >= policy.max_attempts or out_of_memory)
        if given_up:
            return


@given(
    policy=policies,
    failures=histories,
    free=st.lists(st.builds(End, st.sampled_from(sorted(FREE)))),
)
def test_what_costs_no_try_changes_nothing(
    policy: Retry, failures: list[End], free: list[End]
) -> None:
    assert decide(policy, [*free, *failures]) == decide(policy, failures)


def test_a_first_failure_is_followed_at_once_and_the_delay_of_a_row_doubles() -> None:
    seconds = delays([LOST] * 11)
    assert seconds[:5] == [0, 2, 4, 8, 16]
    assert seconds[-1] == MAX_BACKOFF


def test_a_row_of_failures_ends_with_an_attempt_that_brought_the_job_on() -> None:
    assert delays([LOST, LOST, LOST, LOST_FURTHER, LOST, LOST]) == [0, 2, 4, 0, 2, 4]
    assert delays([LOST_FURTHER] * 5) == [0] * 5


def test_what_costs_no_try_ends_a_row_only_with_progress() -> None:
    preempted = End(FailureClass.PREEMPTED)
    assert delays([LOST, preempted, LOST]) == [0, 0, 2]
    preempted_further = End(FailureClass.PREEMPTED, progressed=True)
    assert delays([LOST, LOST, preempted_further, LOST, LOST]) == [0, 2, 0, 0, 2]


def test_only_failures_in_a_row_without_progress_use_up_the_tries() -> None:
    policy = Retry(max_attempts=2)
    assert isinstance(decide(policy, [LOST_FURTHER] * 50), TryAgain)
    assert isinstance(decide(policy, [LOST, *[LOST_FURTHER] * 5]), TryAgain)
    ended = decide(policy, [LOST_FURTHER, LOST_FURTHER, LOST])
    assert isinstance(ended, GiveUp)
    assert "all 2 attempts since the job got further are used up" in ended.reason
    assert isinstance(decide(Retry(max_attempts=1), [LOST_FURTHER]), GiveUp)
    # Memory that ran out a week ago is no second time; twice at one place is.
    full = End(FailureClass.OUT_OF_MEMORY)
    assert isinstance(decide(policy, [full, LOST_FURTHER]), TryAgain)
    further = End(FailureClass.OUT_OF_MEMORY, progressed=True)
    assert isinstance(decide(policy, [full, further]), TryAgain)
    assert isinstance(decide(Retry(max_attempts=9), [further, full]), GiveUp)


@given(policy=policies, failures=histories)
def test_tries_are_used_up_by_the_row_alone(policy: Retry, failures: list[End]) -> None:
    """What was before the attempt that last brought the job on changes nothing."""
    first = max((n for n, end in enumerate(failures) if end.progressed), default=0)
    assert decide(policy, failures) == decide(policy, failures[first:])


def test_memory_that_something_else_holds_gets_a_wait_at_once() -> None:
    assert delays([End(FailureClass.OUT_OF_MEMORY)]) == [2]
    assert delays([LOST, LOST, End(FailureClass.OUT_OF_MEMORY)])[-1] == 4


@given(policy=policies, failures=histories)
def test_no_job_spins(policy: Retry, failures: list[End]) -> None:
    """Whatever is tried again without delay is a first failure, got further, or costs no try."""
    decision = decide(policy, failures)
    if not isinstance(decision, TryAgain) or failures[-1].failure_class in FREE:
        return
    row = next((n for n, end in enumerate(reversed(failures)) if end.progressed), len(failures))
    counted = [end for end in failures[len(failures) - row :] if end.failure_class not in FREE]
    if len(counted) > 1:
        assert decision.after_seconds >= min(policy.backoff_seconds, MAX_BACKOFF)
        assert "in a row" in decision.reason


LOST = End(FailureClass.LOST_WORKER)
LOST_FURTHER = End(FailureClass.LOST_WORKER, progressed=True)


def delays(failures: list[End]) -> list[float]:
    """What each of these is followed by, with a policy that begins with 2 s."""
    policy = Retry(max_attempts=100, backoff_seconds=2)
    decisions = [decide(policy, failures[:n]) for n in range(1, len(failures) + 1)]
    return [d.after_seconds for d in decisions if isinstance(d, TryAgain)]


@given(
    batch=st.integers(1, 5000),
    ranks=st.integers(1, 8),
    micro=st.none() | st.integers(1, 64),
    examples=st.integers(1, 5000),
    policy=policies,
)
def test_a_lack_of_memory_ends_with_a_row_at_once_and_costs_one_try(
    batch: int, ranks: int, micro: int | None, examples: int, policy: Retry
) -> None:
    """Memory runs out with every micro-batch: each next one divides the batch and is half at most."""
    batch *= ranks
    if micro is not None and micro < batch // ranks:
        batch = ranks * micro * (batch // ranks // micro)
    spec = training(batch_size=batch, micro_batch_size=micro and min(micro, batch), ranks=ranks)
    now: int | None = None
    before: list[End] = []
    while True:
        held = min(rows_at_once(spec, now), -(-examples // ranks))
        smaller = smaller_micro_batch(spec, now, held)
        before.append(End(FailureClass.OUT_OF_MEMORY, now))
        less = None if smaller is None else LessAtOnce(held, smaller)
        decision = decide(policy, before, less)
        if smaller is None:
            assert held == 1
            again = len(before) == 1 and policy.max_attempts > 1
            assert isinstance(decision, TryAgain if again else GiveUp)
            return
        assert isinstance(decision, TryAgain)
        assert (decision.micro_batch, decision.after_seconds) == (smaller, 0)
        assert f"next with {smaller}," in decision.reason
        assert smaller <= held // 2
        assert (batch // ranks) % smaller == 0
        assert len(before) <= 13
        lost = [*before, End(FailureClass.LOST_WORKER, smaller)]
        assert isinstance(decide(policy, lost), TryAgain) == (policy.max_attempts > 1)
        now = smaller


def test_the_micro_batch_of_embeddings_stays() -> None:
    spec = training(task="embeddings", batch_size=16)
    assert rows_at_once(spec, None) == 16
    assert smaller_micro_batch(spec, None, 16) is None


def training(task: str = "fill-mask", ranks: int = 1, **hyperparameters: Any) -> TrainSpec:
    return TrainSpec.model_validate(
        {
            "kind": "train",
            "task": task,
            "model": "m",
            "data": {"train": "x"},
            "resources": {"devices": ranks},
            "hyperparameters": hyperparameters,
        }
    )


# --- capability classes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sm", "mebibytes", "queue"),
    [
        # What the cards report, not what they are sold as.
        (75, 15_360, "cuda.sm75.16g"),
        (75, 15_109, "cuda.sm75.16g"),
        (70, 32_510, "cuda.sm70.32g"),
        (80, 40_536, "cuda.sm80.40g"),
        (80, 81_920, "cuda.sm80.80g"),
        (80, 81_153, "cuda.sm80.80g"),
        (90, 81_559, "cuda.sm90.80g"),
        (90, 143_771, "cuda.sm90.141g"),
        (86, 24_576, "cuda.sm86.24g"),
        (89, 23_034, "cuda.sm89.24g"),
        (86, 46_068, "cuda.sm86.48g"),
        (61, 11_264, "cuda.sm61.10g"),
        (50, 2_048, "cuda.sm50.2g"),
        (100, 183_359, "cuda.sm100.180g"),
    ],
)
def test_classes_of_real_cards(sm: int, mebibytes: int, queue: str) -> None:
    assert Capability("cuda", sm, mebibytes * 1024**2).queue == queue


def test_cpu_is_one_class() -> None:
    assert Capability("cpu", 0, 3 * GIB).queue == Capability("cpu", 0, 300 * GIB).queue == "cpu"


capabilities = st.builds(
    Capability,
    st.just("cuda"),
    st.sampled_from([70, 75, 80, 86, 89, 90, 100]),
    st.integers(GIB, 300 * GIB),
)


@given(a=capabilities, b=capabilities)
def test_a_class_has_one_rank_and_promises_its_step(a: Capability, b: Capability) -> None:
    assert (a.queue == b.queue) == (a.rank == b.rank)
    assert a.memory_bytes >= a.memory_step * GIB * 0.92
    if a.memory_step == b.memory_step and a.compute_capability <= b.compute_capability:
        assert a.features <= b.features
        assert a.rank <= b.rank
    assert Capability("cpu", 0, a.memory_bytes).rank < b.rank
    if a.memory_bytes >= 4 * GIB:
        assert a.memory_step in _STEPS


def test_device_queues_are_no_class_queues() -> None:
    assert device_queue("gpu0@host") == "device.gpu0@host"


def test_simulated_devices() -> None:
    found = parse_simulated("2xA100-80GB, t4-16gb,H100")
    assert [d.model for d in found] == ["A100-80GB", "A100-80GB", "T4-16GB", "H100-80GB"]
    assert [d.capability.queue for d in found[1:]] == [
        "cuda.sm80.80g",
        "cuda.sm75.16g",
        "cuda.sm90.80g",
    ]


@given(
    wanted=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from(sorted(KNOWN_GPUS)), st.integers(1, 300)),
        min_size=1,
        max_size=4,
    )
)
def test_simulated_devices_are_what_is_written(wanted: list[tuple[int, str, int]]) -> None:
    found = parse_simulated(",".join(f"{n}x{name}-{gib}GB" for n, name, gib in wanted))
    expected = [(f"{name}-{gib}GB", gib * GIB) for n, name, gib in wanted for _ in range(n)]
    assert [(d.model, d.capability.memory_bytes) for d in found] == expected


@pytest.mark.parametrize(
    "text",
    ["", ",", "0xT4", "T5", "2xx", "T4-0GB", "-1xT4", "T4-16", "999xT4", "T4-9999GB", "T4;L4"],
)
def test_malformed_simulation_is_refused_for_people(text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse_simulated(text)
    assert error.value.param == "simulate"


@given(text=st.text(max_size=20))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        assert parse_simulated(text)
    except ConfigurationError as error:
        assert str(error)


# --- the table of transitions ------------------------------------------------------------------


def test_terminal_states_are_left_by_nothing_and_the_others_lead_there() -> None:
    for jobs in JobState:
        reachable, frontier = {jobs}, {jobs}
        while frontier:
            frontier = {t.target for t in JOB_TRANSITIONS if t.source in frontier} - reachable
            reachable |= frontier
        assert any(state.terminal for state in reachable)
        assert not jobs.terminal or reachable == {jobs}
    for attempts in AttemptState:
        targets = [t.target for t in ATTEMPT_TRANSITIONS if t.source is attempts]
        assert bool(targets) == (not attempts.terminal)


@given(a=st.sampled_from(JobState), b=st.sampled_from(JobState))
def test_the_table_is_the_whole_truth(a: JobState, b: JobState) -> None:
    listed = any((t.source, t.target) == (a, b) for t in JOB_TRANSITIONS)
    assert job_may_become(a, b) == listed == (a in job_states_leading_to(b))


def test_attempts_go_from_active_to_terminal_or_running() -> None:
    for a in AttemptState:
        for b in AttemptState:
            if attempt_may_become(a, b):
                assert not a.terminal
                assert b.terminal or b is AttemptState.RUNNING


def test_each_transition_names_a_function_of_the_store() -> None:
    modules = ("dispatch", "claim", "finish", "cancel")
    functions = {
        name
        for module in modules
        for name, _ in inspect.getmembers(
            importlib.import_module(f"shared.store.{module}"), inspect.isfunction
        )
    }
    assert {t.by for t in (*JOB_TRANSITIONS, *ATTEMPT_TRANSITIONS)} <= functions
