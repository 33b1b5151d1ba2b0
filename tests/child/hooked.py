"""Hooks for the child's tests, and the handlers that they are tried on. They write to the file that the job names."""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
from typing import Any

import psycopg

from roost_client import CurrentJob, Hooks, SnoozeJob, current_job, job

trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")


def write(path: str, *words: object) -> None:
    with open(path, "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def path_of(job: CurrentJob) -> str:
    return str(job.metadata["path"])


def before(job: CurrentJob, *, ctx: dict[str, Any]) -> None:
    assert current_job() is job
    ctx["began"] = job.id
    trace.set(f"trace {job.id}")
    write(path_of(job), "before", job.task)
    time.sleep(job.metadata.get("sleep_before", 0))
    if job.metadata.get("fork") == "before" and (pid := os.fork()):
        os.waitpid(pid, 0)
    if job.metadata.get("fail") == "before":
        raise ValueError("in before_job")


def after(job: CurrentJob, *, result: Any, error: BaseException | None, ctx: dict[str, Any]) -> None:
    assert ctx["began"] == job.id
    write(path_of(job), "after", repr(result), type(error).__name__)
    if job.metadata.get("fail") == "after":
        raise SystemExit(3)
    time.sleep(job.metadata.get("sleep_after", 0))
    write(path_of(job), "end")


async def before_in_loop(job: CurrentJob, *, ctx: dict[str, Any]) -> None:
    await asyncio.sleep(0)
    ctx["loop"] = asyncio.get_running_loop()
    before(job, ctx=ctx)


async def after_in_loop(job: CurrentJob, *, result: Any, error: BaseException | None, ctx: dict[str, Any]) -> None:
    await asyncio.sleep(0)
    assert ctx["loop"] is asyncio.get_running_loop()
    after(job, result=result, error=error, ctx=ctx)


hooks = Hooks(before, after)
async_hooks = Hooks(before_in_loop, after_in_loop)
only_after = Hooks(after_job=lambda job, *, result, error, ctx: write(path_of(job), "after", result, ctx))
no_hooks = "not a Hooks"


@job("seen")
def seen() -> str:
    write(path_of(current_job()), "handler", trace.get())
    return "a result"


@job("seen_in_coroutine")
async def seen_in_coroutine() -> bool:
    write(path_of(current_job()), "handler", trace.get())
    return isinstance(asyncio.get_running_loop(), asyncio.AbstractEventLoop)


@job("seen_and_fail")
def seen_and_fail() -> None:
    raise KeyError("no")


@job("seen_and_snooze")
def seen_and_snooze() -> None:
    raise SnoozeJob(5)


@job("seen_and_bad_result")
def seen_and_bad_result() -> object:
    return {1, 2}


@job("seen_and_sleep")
def seen_and_sleep() -> None:
    write(path_of(current_job()), "handler")
    time.sleep(60)


@job("seen_and_sleep_in_coroutine")
async def seen_and_sleep_in_coroutine() -> None:
    write(path_of(current_job()), "handler")
    await asyncio.sleep(60)


@job("seen_and_commit")
def seen_and_commit(dsn: str) -> str:
    with psycopg.connect(dsn) as conn, current_job().transaction(conn):
        pass
    raise ValueError("after it")
