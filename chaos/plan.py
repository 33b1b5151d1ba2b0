"""What a seed stands for: which jobs are enqueued and which faults are injected, in which order. Pure.

A campaign goes in steps, one a fault: the jobs of a step are enqueued, then its fault is injected while they run. So
how far a campaign is does not depend on how fast the machine is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from chaos.jobs import KINDS, PAUSED_QUEUE, Draft

MASTERS = ("m1", "m2", "m3")
_PAUSE_STEPS = 3  # a queue is paused for so many steps, and then runs for as many
_SLOW_STEPS = 3  # for which nothing else hits the master under a slow fault
_NEAR = 300  # jobs back, at the most, a parent is
_CANCEL_STEPS = 2  # after which a waiting job is cancelled


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """`key` is its name from the first to the last: it stands in its arguments."""

    key: int
    kind: str
    step: int
    draft: Draft
    cancel_step: int | None = None  # of those that are cancelled while they wait
    parents: tuple[int, ...] = ()  # keys of the jobs that it depends on


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """`target` is a master. `dose` says how much, from 0 to 1, `pick` which of several: each fault in its way."""

    step: int
    fault: str
    target: str
    dose: float
    pick: float


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    jobs: tuple[PlannedJob, ...]
    faults: tuple[PlannedFault, ...]
    pauses: Mapping[int, bool]  # by step: whether PAUSED_QUEUE is paused from then on

    @property
    def steps(self) -> int:
        return len(self.faults)

    def lines(self) -> Iterator[str]:
        """The plan to read: two equal plans have equal lines."""
        for fault in self.faults:
            if fault.step in self.pauses:
                yield f"{fault.step:4}  {'pause' if self.pauses[fault.step] else 'resume'} {PAUSED_QUEUE}"
            yield f"{fault.step:4}  {fault.fault} {fault.target} dose {fault.dose:.3f} pick {fault.pick:.3f}"
        for job in self.jobs:
            yield f"job {job.key}  step {job.step}  {job.kind}  {job.draft}"


def make_plan(
    seed: int, *, faults: int, jobs: int, kinds_of_fault: Mapping[str, bool], kinds_of_job: Sequence[str] = tuple(KINDS)
) -> Plan:
    """The plan of a seed. Each kind of fault comes once before any comes again.

    `kinds_of_fault` says of each whether it is slow: those that follow such a one have other targets for a while.
    """
    return Plan(
        seed,
        tuple(_jobs(Random(f"jobs {seed}"), jobs, faults, kinds_of_job)),
        tuple(_faults(Random(f"faults {seed}"), faults, kinds_of_fault)),
        {step: (step // _PAUSE_STEPS) % 2 == 0 for step in range(1, faults, _PAUSE_STEPS)},
    )


def _faults(dice: Random, number: int, kinds: Mapping[str, bool]) -> Iterator[PlannedFault]:
    coming: list[str] = []
    busy_until = dict.fromkeys(MASTERS, 0)
    for step in range(number):
        if not coming:
            coming = dice.sample(list(kinds), len(kinds))
        kind = coming.pop()
        target = dice.choice([master for master in MASTERS if busy_until[master] <= step])
        if kinds[kind]:
            busy_until = dict.fromkeys(MASTERS, 0) | {target: step + _SLOW_STEPS}
        yield PlannedFault(step, kind, target, dice.random(), dice.random())


def _jobs(dice: Random, number: int, steps: int, names: Sequence[str]) -> Iterator[PlannedJob]:
    weights = [KINDS[name].weight for name in names]
    near: list[int] = []  # a unique job is enqueued only once its key is free
    for key, kind in enumerate(dice.choices(names, weights, k=number)):
        step = key * steps // number
        draft = KINDS[kind].make(dice)
        draft = replace(draft, args={"key": key, **draft.args})
        cancel_step = min(step + _CANCEL_STEPS, steps - 1) if draft.cancel == "waiting" else None
        parents = dice.sample(near, min(draft.parents, len(near)))
        yield PlannedJob(key, kind, step, draft, cancel_step, tuple(sorted(parents)))
        if draft.unique_key is None:
            near = [*near, key][-_NEAR:]
