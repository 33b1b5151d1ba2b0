"""That a seed decides everything, and that its plan leaves nothing out."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from chaos.faults import FAULTS
from chaos.jobs import KINDS, PAUSED_QUEUE
from chaos.plan import MASTERS, Plan, make_plan

SLOW = {name: fault.slow for name, fault in FAULTS.items()}


def plan(seed: int, faults: int = 60, jobs: int = 5_000) -> Plan:
    return make_plan(seed, faults=faults, jobs=jobs, kinds_of_fault=SLOW)


def test_a_seed_makes_the_same_plan_each_time_and_another_one_makes_another() -> None:
    assert list(plan(7).lines()) == list(plan(7).lines())
    assert list(plan(7).lines()) != list(plan(8).lines())


def test_every_kind_of_fault_comes_before_any_comes_again() -> None:
    for seed in range(20):
        counts = Counter(fault.fault for fault in plan(seed, faults=2 * len(FAULTS)).faults)
        assert set(counts.values()) == {2}


def test_every_kind_of_job_comes_in_a_short_campaign() -> None:
    wanted = {name for name, kind in KINDS.items() if kind.weight}
    for seed in range(20):
        assert {job.kind for job in plan(seed).jobs} == wanted


def test_jobs_come_in_every_step_and_each_has_a_key_of_its_own() -> None:
    jobs = plan(1).jobs
    assert {job.step for job in jobs} == set(range(60))
    assert [job.draft.args["key"] for job in jobs] == [job.key for job in jobs] == list(range(5_000))


def test_what_is_cancelled_as_it_waits_is_cancelled_in_a_later_step() -> None:
    for job in plan(1).jobs:
        assert (job.cancel_step is not None) == (job.draft.cancel == "waiting")
        assert job.cancel_step is None or job.step <= job.cancel_step < 60


def test_nothing_else_hits_the_master_that_a_slow_fault_has_just_hit() -> None:
    for seed in range(20):
        faults = plan(seed).faults
        for fault, following in pairwise(faults):
            assert fault.target in MASTERS
            assert not SLOW[fault.fault] or following.target != fault.target


def test_the_queue_is_paused_and_resumed_in_turn() -> None:
    changes = [paused for _, paused in sorted(plan(1).pauses.items())]
    assert changes[:4] == [True, False, True, False]
    assert any(job.draft.queue == PAUSED_QUEUE for job in plan(1).jobs)
