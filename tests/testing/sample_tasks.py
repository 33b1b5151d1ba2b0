"""Handlers that end in every way in which one can that leaves its process alive."""

from __future__ import annotations

import sys
from typing import Any

import psycopg
from pydantic import BaseModel

from roost_client import HandlerRegistry, JobCancelled, SnoozeJob, current_job, job

registry = HandlerRegistry()
test_conn: psycopg.Connection[Any] | None = None  # where a test runs the handlers itself


class Order(BaseModel):
    number: int
    note: str = "none"


class Odd(BaseException):
    pass


@job("result", registry=registry)
def result(value: Any = None) -> Any:
    return value


@job("order", args_model=Order, registry=registry)
def order(order: Order) -> Order:
    return order


@job("coroutine", registry=registry)
async def coroutine(fails: bool = False) -> str:
    if fails:
        raise ValueError("in a coroutine")
    return "awaited"


@job("fails", registry=registry)
def fails(text: str = "on purpose") -> None:
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise ValueError(text) from error


@job("snoozes", registry=registry)
def snoozes(seconds: float) -> None:
    raise SnoozeJob(seconds)


@job("odd_result", registry=registry)
def odd_result(kind: str) -> Any:
    if kind == "awaitable":
        return coroutine()
    return {"set": {1, 2}, "nan": float("nan"), "surrogate": "\udc80", "nul": "a\0b", "large": "x" * (1 << 20)}[kind]


@job("raises", registry=registry)
def raises(kind: str) -> None:
    raise {
        "odd": Odd("odd"), "interrupt": KeyboardInterrupt(), "cancelled": JobCancelled("by itself"),
        "nul": ValueError("nul \0 surrogate \udc80"), "long": ValueError("x" * 10_000), "timeout": TimeoutError("own"),
    }[kind]  # fmt: skip


@job("exits", registry=registry)
def exits() -> None:
    sys.exit(3)


@job("tells", registry=registry)
def tells() -> dict[str, Any]:
    here = current_job()
    return {
        "task": here.task,
        "attempt": here.attempt,
        "tags": here.tags,
        "case": here.metadata["case"],
        "cancel_requested": here.cancel_requested,
        "has_deadline": here.deadline is not None,
    }


@job("effect", registry=registry)
def effect(dsn: str, fails: str = "") -> str:
    conn = test_conn or psycopg.connect(dsn)
    try:
        with current_job().transaction(conn) as block:
            conn.execute("UPDATE effects SET n = n + 1")
            block.result = "of the block"
            if fails == "inside":
                raise ValueError(fails)
            if fails == "statement":
                conn.execute("SELECT 1 / 0")
        if fails == "after":
            raise ValueError(fails)
    finally:
        if conn is not test_conn:
            conn.close()
    return "of the handler"
