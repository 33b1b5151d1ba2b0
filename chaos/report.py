"""What a campaign found, as a table, as JSON and Markdown files, and as the whole story of a job that went wrong."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import processor
from chaos.checker import FORMULAS, Findings, recoveries
from chaos.evidence import Evidence, Sample
from chaos.fleet import Master

_STORIES = 20
_SHOWN = 12


def summary(evidence: Evidence, findings: Findings) -> dict[str, Any]:
    """All figures of the report."""
    plan = evidence.plan
    kinds = {job.key: job.kind for job in plan.jobs}
    states: dict[str, Counter[str]] = {}
    for key, kind in kinds.items():
        states.setdefault(kind, Counter())[evidence.rows.get(evidence.told.ids.get(key, 0), "lost")] += 1
    return {
        "seed": plan.seed,
        "seconds": round(evidence.seconds, 1),
        "jobs": len(plan.jobs),
        "runs": len(evidence.runs),
        "jobs by kind": {kind: dict(counter) for kind, counter in sorted(states.items())},
        "faults": len(evidence.injected),
        "faults by kind": dict(sorted(Counter(each.fault for each in evidence.injected).items())),
        "left out": dict(evidence.skipped),
        "recovery seconds": {
            formula: {
                "bound": FORMULAS[formula][0],
                "bound seconds": FORMULAS[formula][1],
                "times": len(times),
                "p50": round(quantile(times, 0.5), 3),
                "p99": round(quantile(times, 0.99), 3),
                "max": round(times[-1], 3),
            }
            for formula, times in recoveries(evidence).items()
        },
        "overlaps by cause": dict(findings.overlaps),
        "longest overlap seconds": round(findings.longest_overlap_seconds, 3),
        "attempts counted and not started, by cause": dict(findings.not_started),
        "runs that count as no attempt, by cause": dict(findings.not_counted),
        "results lost of handlers that returned, by cause": dict(findings.lost_results),
        "cron slots that fired": findings.cron_slots,
        "jobs discarded because faults crashed them too often": findings.crashed_out,
        "processes that outlived a master and its template": findings.left_by_guarantee,
        "most open files above the start": dict(findings.more_files),
        "most MiB above the start": {role: round(number / 2**20, 1) for role, number in findings.more_bytes.items()},
        "faults that the processes judged by these have seen": {
            role: {"processes": len(lives), "median": statistics.median_low(lives), "max": max(lives)}
            for role, lives in findings.lives.items()
        },
        "processes too short-lived to be judged by these": dict(findings.short_lives),
        "violations": [asdict(violation) for violation in findings.violations],
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile of sorted values."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def table(evidence: Evidence, findings: Findings) -> str:
    """The report in Markdown."""
    figures = summary(evidence, findings)
    lines = [
        f"seed {figures['seed']}: {figures['jobs']} jobs in {figures['runs']} runs, {figures['faults']} faults,"
        f" {figures['seconds']} s, {len(findings.violations)} violations",
        "",
        "| recovery | bound | times | p50 | p99 | max |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in figures["recovery seconds"].items():
        bound = (
            f"{times['bound']} = {times['bound seconds']:g} s" if not times["bound"][0].isdigit() else times["bound"]
        )
        spread = " | ".join(f"{times[key]:.2f} s" for key in ("p50", "p99", "max"))
        lines.append(f"| {name} | {bound} | {times['times']} | {spread} |")
    lines += ["", "| jobs | how they ended |", "|---|---|"]
    for kind, states in figures["jobs by kind"].items():
        lines.append(f"| {kind} | {', '.join(f'{number} {state}' for state, number in states.items())} |")
    lines += ["", "| faults | times |", "|---|---|"]
    lines += [f"| {name} | {number} |" for name, number in figures["faults by kind"].items()]
    lines += [f"| {name} | left out: {reason} |" for name, reason in figures["left out"].items()]
    lines += ["", "| counted | cause | times |", "|---|---|---|"]
    for what in (
        "overlaps by cause",
        "attempts counted and not started, by cause",
        "runs that count as no attempt, by cause",
        "results lost of handlers that returned, by cause",
    ):
        counts = figures[what] or {"none": 0}
        lines += [
            f"| {what.removesuffix(', by cause').removesuffix(' by cause')} | {c} | {n} |" for c, n in counts.items()
        ]
    lines += [
        f"| cron slots | fired | {findings.cron_slots} |",
        f"| jobs discarded | faults killed their children too often | {findings.crashed_out} |",
        *(f"| most open files above its start | {role} | {n} |" for role, n in findings.more_files.items()),
        *(f"| most MiB above its start | {role} | {n / 2**20:.1f} |" for role, n in findings.more_bytes.items()),
        *(
            f"| processes judged by these | {role}: {lives['median']} faults in the median life,"
            f" {lives['max']} in the longest | {lives['processes']} |"
            for role, lives in figures["faults that the processes judged by these have seen"].items()
        ),
        *(f"| processes too short-lived for that | {role} | {n} |" for role, n in findings.short_lives.items()),
        f"| processes outlived a master and its template | both were killed at once | {findings.left_by_guarantee} |",
        "",
        f"Longest overlap of two runs of one job: {figures['longest overlap seconds']:.2f} s.",
    ]
    return "\n".join(lines)


def violations(findings: Findings, results: Path) -> str:
    by_check = Counter(violation.check for violation in findings.violations)
    lines = ["", f"{len(findings.violations)} violations: {', '.join(f'{n} {check}' for check, n in by_check.items())}"]
    for violation in findings.violations[:_SHOWN]:
        job = "" if violation.job_id is None else f"job {violation.job_id}: "
        lines.append(f"  {violation.check}: {job}{violation.what}")
    lines.append(f"the stories of the jobs and the daemons' logs are in {results}/evidence")
    return "\n".join(lines)


def write(results: Path, evidence: Evidence, findings: Findings) -> None:
    results.mkdir(parents=True, exist_ok=True)
    figures = {"at": datetime.now(UTC).isoformat(timespec="seconds")} | summary(evidence, findings)
    (results / "chaos.json").write_text(json.dumps(figures, indent=1) + "\n")
    (results / "chaos.md").write_text(table(evidence, findings) + "\n")


def document(repeat: str, commit: str, evidence: Evidence, findings: Findings) -> str:
    """The report to keep: with the commit, the machine, and all that went wrong."""
    postgres = evidence.postgres_version
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    lines = [
        "# The last long campaign",
        "",
        f"Written by `make chaos-long` at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; [the fault campaign](chaos.md) says"
        " what is checked.",
        "",
        f"- commit {commit}",
        f"- `{repeat}`",
        f"- {len(os.sched_getaffinity(0))} cores of {processor()}, {memory:.0f} GB, Linux {platform.release()},"
        f" Python {platform.python_version()}, PostgreSQL {postgres}",
        "",
        table(evidence, findings),
    ]
    lines += [f"- {violation.check}: {violation.what}" for violation in findings.violations]
    return "\n".join(lines) + "\n"


def keep_stories(results: Path, evidence: Evidence, findings: Findings, masters: Iterable[Master]) -> None:
    """Writes down all that is known of the jobs that went wrong, and keeps the logs."""
    folder = results / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    masters = list(masters)
    for master in masters:
        if master.log_file.exists():
            (folder / master.log_file.name).write_bytes(master.log_file.read_bytes())
    faults = [f"{each.began_at:.3f} to {each.ended_at:.3f}  {each.fault} {each.target}" for each in evidence.injected]
    (folder / "faults.txt").write_text("\n".join(faults) + "\n")
    (folder / "samples.txt").write_text("".join(f"{_sampled(sample)}\n" for sample in evidence.samples))
    jobs = list(dict.fromkeys(violation.job_id for violation in findings.violations if violation.job_id is not None))
    for job_id in jobs[:_STORIES]:
        complaints = [f"{each.check}: {each.what}" for each in findings.violations if each.job_id == job_id]
        (folder / f"job-{job_id}.txt").write_text(
            "\n".join([*complaints, "", *story(evidence, job_id, masters)]) + "\n"
        )


def _sampled(sample: Sample) -> str:
    files = ", ".join(f"{number} {name}" for name, number in sorted(Counter(sample.files).items()))
    of = f"{sample.role} {sample.pid} of {sample.master}"
    return f"{sample.at:.3f}  {of}: {sample.rss_bytes >> 10} KiB, {len(sample.files)} files: {files}"


def story(evidence: Evidence, job_id: int, masters: Iterable[Master]) -> list[str]:
    """What the ledger, the triggers and the daemons' logs say of a job, in order; times are monotonic seconds."""
    told: list[tuple[float, str]] = []
    for run in evidence.runs:
        if run.job_id == job_id:
            beside = f", beside process {run.beside}" if run.beside else ""
            told.append((run.started_at, f"ledger   lease {run.lease} starts in {run.pid} of {run.master}{beside}"))
            if run.ended_at is not None:
                told.append((run.ended_at, f"ledger   lease {run.lease} ends: {run.how}"))
    for change in evidence.changes:
        if change.job_id == job_id:
            known = {k: v for k, v in asdict(change).items() if v is not None and k not in ("seq", "at", "job_id")}
            told.append((change.at - evidence.clock_offset, f"trigger  {known}"))
    for master in masters:
        for entry in master.entries():
            if entry.get("job_id") == job_id:
                at = datetime.fromisoformat(str(entry["timestamp"])).timestamp() - evidence.clock_offset
                told.append((at, f"{master.name} log   {entry}"))
    return [f"{at:.4f}  {line}" for at, line in sorted(told)]
