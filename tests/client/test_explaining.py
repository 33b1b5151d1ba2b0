"""explain: what it says of facts, and that the facts it reads are those of the database."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from roost_client import Explanation, InvalidJobError, JobInsert, Roost, statements
from roost_client.explain import CODES, FACTS, MAX_AHEAD, MAX_ANCESTORS, WINDOW_SECONDS, Facts, Worker, explanation_of
from roostd.core import throttle
from roostd.store import statements as store
from tests.client.rows import put

Conn = psycopg.Connection[Any]
NOW = datetime(2040, 1, 31, 10, tzinfo=UTC)
LATER = NOW + timedelta(hours=3)
WORKER = Worker(id="w", name="alpha", hostname="web1", queues=["default"], knows=True, children=4, busy=1)
CLAIM = {"worker_id": "w", "since": NOW - timedelta(minutes=5), "attempt": 2, "cancel_requested": False}
LIMIT = {
    "rate_per_minute": None, "max_concurrency": None, "is_new": False, "running": 0, "starts": 0, "next_at": NOW,
}  # fmt: skip
PAUSED = {"since": NOW}


def of(**facts: Any) -> Explanation:
    """What is said of a job that may run now, but for `facts`."""
    return explanation_of(Facts(**{"job_id": 7, "now": NOW, "scheduled_at": NOW, "workers": [WORKER], **facts}))


def worker(**fields: Any) -> Worker:
    return Worker(**{**{name: getattr(WORKER, name) for name in Worker.__slots__}, **fields})


# Facts, and the code, what the sentence holds, and the command that follow.
TABLE: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"exists": False, "last_id": 5}, "unknown", "no job has ever had this id: the last one given out is 5", None),
    ({"exists": False}, "unknown", "none has been given out yet", None),
    ({"exists": False, "job_id": -3, "last_id": 5}, "unknown", "no job has ever had this id", None),
    ({"exists": False, "last_id": 9}, "unknown", "rolled back, or the job was deleted", None),
    ({"exists": False, "last_id": 9, "open_writers": 1}, "unknown", "(1 transaction that writes is open)", None),
    ({"exists": False, "last_id": 9, "open_writers": 3}, "unknown", "(3 transactions that write are open)", None),
    ({"state": "completed", "ended_at": NOW, "attempt": 2}, "completed", "at 2040-01-31T10:00:00Z, in attempt 2", None),
    (
        {"state": "discarded", "attempt": 3, "max_attempts": 3, "error": "ValueError: no\nmore"},
        "discarded",
        "attempt 3 of 3: ValueError: no",
        "roostctl retry 7",
    ),
    (
        {"state": "discarded", "is_archived": True},
        "discarded",
        "it is in the archive, so it can only be enqueued anew",
        None,
    ),
    (
        {"state": "discarded", "key_holder": 9},
        "discarded",
        "its unique_key is now that of job 9",
        "roostctl explain 9",
    ),
    ({"state": "cancelled", "cancel_requested": True}, "cancelled", "it was cancelled at", "roostctl retry 7"),
    ({"state": "cancelled", "error": "X: y"}, "cancelled", "unknown time: X: y", "roostctl retry 7"),
    (
        {"state": "cancelled", "dead_parents": [(5, "discarded", False)]},
        "cancelled",
        "because job 5, on which it depends, was discarded",
        "roostctl retry 5 --with-dependents",
    ),
    (
        {"state": "cancelled", "dead_parents": [(5, "cancelled", False), (2, "discarded", False)]},
        "cancelled",
        "job 5, on which it depends, was cancelled for the sake of job 2",
        "roostctl retry 2 --with-dependents",
    ),
    (
        {"state": "cancelled", "cancel_requested": True, "dead_parents": [(5, "discarded", True)]},
        "cancelled",
        "and job 5, on which it depends, was discarded; job 5 is in the archive",
        None,
    ),
    ({"claim": CLAIM}, "executing", "worker alpha on web1 has had it for 5 minutes, attempt 2 of 20", None),
    ({"claim": {**CLAIM, "cancel_requested": True}}, "executing", "it has been asked to cancel", None),
    (
        {"claim": CLAIM, "workers": [worker(silent_seconds=200), worker(id="v")]},
        "executing",
        "last heard of 3 minutes ago: others take the job from 2040-01-31T10:01:40Z on",
        None,
    ),
    (
        {"claim": CLAIM, "workers": [worker(silent_seconds=400)]},
        "executing",
        "others take the job now, but there is no other worker",
        "roostd -c /etc/roost.toml",
    ),
    (
        {"claim": CLAIM, "workers": [worker(id="v")]},
        "executing",
        "a worker that is gone has had it for 5 minutes, attempt 2 of 20; it runs again as soon as a worker frees it",
        None,
    ),
    ({"paused": PAUSED}, "paused", "queue 'default' is paused, since 2040-01-31T10", "roostctl resume default"),
    ({"paused": PAUSED, "queue": "a b"}, "paused", "'a b' is paused", "roostctl resume 'a b'"),
    ({"paused": PAUSED, "queue": "-x"}, "paused", "'-x' is paused", "roostctl resume -- -x"),
    ({"paused": PAUSED, "queue": "é\n'\xa0\\"}, "paused", "is paused", r"roostctl resume $'é\x0a\'\xc2\xa0\\'"),
    (
        {"state": "cancelled", "dead_parents": [(n, "cancelled", False) for n in range(MAX_ANCESTORS)]},
        "cancelled",
        f"for the sake of job {MAX_ANCESTORS - 1}, which may have been for another's",
        f"roostctl explain {MAX_ANCESTORS - 1}",
    ),
    (
        {"state": "cancelled", "dead_parents": [(5, "cancelled", True), (2, "discarded", False)]},
        "cancelled",
        "job 5 is in the archive",
        None,
    ),
    ({"workers": []}, "no-worker", "no live worker serves queue 'default': none runs", "roostd -c /etc/roost.toml"),
    (
        {"workers": [worker(silent_seconds=301)]},
        "no-worker",
        "worker alpha on web1 did, and was last heard of 5 minutes ago",
        "roostd -c /etc/roost.toml",
    ),
    ({"queue": "defualt"}, "no-worker", "did you mean 'default'?", "roostctl reload --worker alpha"),
    ({"queue": "x"}, "no-worker", "add it to the queues of a pool", "roostctl reload --worker alpha"),
    (
        {"workers": [worker(queues=[], is_draining=True)]},
        "draining",
        "alpha on web1 is about to end",
        "roostd -c /etc/roost.toml",
    ),
    ({"workers": [worker(is_draining=True)]}, "draining", "is about to end", "roostd -c /etc/roost.toml"),
    ({"workers": [worker(queues=[], is_draining=True), WORKER]}, "due", "alpha on web1 takes it", None),
    (
        {"workers": [worker(queues=["other"], is_draining=True)]},
        "no-worker",
        "no live worker serves",
        "roostctl reload --worker alpha",
    ),
    (
        {"task": "sned", "workers": [worker(knows=False)], "tasks": {"send", "x"}, "error": "UnknownTaskError: no"},
        "unknown-task",
        "'sned'; did you mean 'send'? Otherwise add its module to handlers.modules; the last attempt failed with"
        " UnknownTaskError: no",
        "roostctl reload --worker alpha",
    ),
    ({"workers": [worker(knows=False), worker(id="v", knows=None)]}, "due", "it may run now", None),
    ({"workers": [worker(knows=False), worker(id="v", knows=True)]}, "due", "it may run now", None),
    (
        {"parents_left": 2, "parents": [(3, "executing"), (4, "retryable")]},
        "blocked",
        "it waits for 2 jobs: 3 (executing), 4 (retryable)",
        "roostctl explain 4",
    ),
    (
        {"parents_left": 5012, "parents": [(n, "executing") for n in range(10)]},
        "blocked",
        "9 (executing) and 5,002 more",
        "roostctl explain 0",
    ),
    ({"parents_left": 1}, "blocked", "have ended, and it is about to be told", None),
    ({"scheduled_at": LATER}, "scheduled", "it is due at 2040-01-31T13:00:00Z, in 3 hours", "roostctl retry 7"),
    (
        {"scheduled_at": LATER, "state": "retryable", "attempt": 2, "error": "OSError: no"},
        "retry-backoff",
        "attempt 2 of 20 failed with OSError: no; the next is due at 2040-01-31T13:00:00Z",
        "roostctl retry 7",
    ),
    (
        {"task": "pay", "limit": {**LIMIT, "max_concurrency": 2, "running": 2}},
        "throttled",
        "task 'pay' is throttled: 2 run at once, and max_concurrency is 2",
        "roostctl jobs --task pay --state executing",
    ),
    (
        {"limit": {**LIMIT, "rate_per_minute": 6, "starts": 6, "next_at": NOW + timedelta(seconds=12)}},
        "throttled",
        "6 have started in the last minute, and rate_per_minute is 6; there is room for the next in 12 s",
        None,
    ),
    ({"limit": {**LIMIT, "rate_per_minute": 6, "starts": 5, "is_new": True}}, "throttled", "limits are new", None),
    ({"limit": {**LIMIT, "rate_per_minute": 6, "starts": 5, "max_concurrency": 1}}, "due", "it may run now", None),
    ({"ahead": 1}, "behind", "1 job of its queue comes before it; 1 of 4 children busy (alpha on web1)", None),
    ({"ahead": 3, "workers": [worker(busy=None)]}, "behind", "3 jobs of its queue come before it", None),
    ({"ahead": MAX_AHEAD + 1}, "behind", "more than 10,000 jobs of its queue", None),
    ({"workers": [worker(busy=4)]}, "busy", "first in line, but all 4 children that serve queue 'default' are", None),
    ({"workers": [worker(children=1, busy=1)]}, "busy", "but the only child that serves queue 'default' is busy", None),
    ({"workers": [worker(busy=None)]}, "due", "it may run now and is first in line: alpha on web1", None),
    (
        {"scheduled_at": NOW - timedelta(minutes=5)},
        "due",
        "it has been due for 5 minutes, so something may be wrong",
        "roostctl doctor",
    ),
    ({"workers": [worker(silent_seconds=90)]}, "due", "no worker of the queue was heard of for 90 s", None),
]


@pytest.mark.parametrize(("facts", "code", "told", "command"), TABLE)
def test_what_is_said_of_each_case(facts: dict[str, Any], code: str, told: str, command: str | None) -> None:
    said = of(**facts)
    assert (said.code, said.command) == (code, command)
    assert told in said.reason
    assert said.job_id == facts.get("job_id", 7)
    json.dumps(said.details)


def test_the_table_has_every_code() -> None:
    assert {code for _, code, _, _ in TABLE} == set(CODES)


# Each keeps the job from running by itself. The first of them is told, then the next…
HOLDS: list[tuple[str, dict[str, Any]]] = [
    ("paused", {"paused": PAUSED}),
    ("no-worker", {"workers": []}),
    ("unknown-task", {"workers": [worker(knows=False)]}),
    ("blocked", {"parents_left": 1, "parents": [(1, "available")]}),
    ("scheduled", {"scheduled_at": LATER}),
    ("behind", {"ahead": 5}),
]


@pytest.mark.parametrize("first", range(len(HOLDS)))
def test_what_waiting_does_not_mend_is_told_first(first: int) -> None:
    facts: dict[str, Any] = {}
    for _, held in reversed(HOLDS[first:]):
        facts.update(held)
    said = of(**facts)
    assert said.code == HOLDS[first][0]
    # Without workers nothing is known of tasks; and whose turn it is matters only where nothing else keeps the job.
    hidden = {"unknown-task"} if facts.get("workers") == [] else set()
    assert said.details.get("also", []) == [c for c, _ in HOLDS[first + 1 : -1] if c not in hidden]


def test_a_limit_counts_only_what_is_due() -> None:
    limit = {**LIMIT, "max_concurrency": 1, "running": 1}
    assert of(limit=limit, ahead=3).code == "throttled"
    for held, code in (({"scheduled_at": LATER}, "scheduled"), ({"parents_left": 1}, "blocked")):
        said = of(limit=limit, **held)
        assert (said.code, said.details["also"]) == (code, [])


def test_a_start_counts_for_as_long_as_workers_count_it() -> None:
    assert WINDOW_SECONDS == throttle.WINDOW_SECONDS


# -- real rows


@pytest.fixture
def add_worker(observer: Conn) -> Callable[..., str]:
    def add(queues: list[str], silent_seconds: float = 0, name: str = "alpha", **metadata: Any) -> str:
        worker_id = str(uuid4())
        observer.execute(
            "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, last_seen_at, metadata)"
            " VALUES (%s, %s, 'web1', 1, %s, 4, now() - make_interval(secs => %s), %s)",
            (worker_id, name, queues, silent_seconds, json.dumps(metadata)),
        )
        return worker_id

    return add


def test_an_id_without_a_job(client: Roost, dsn: str, conn: Conn) -> None:
    assert "none has been given out yet" in client.explain(1).reason
    job_id = client.enqueue("a")
    assert "the last one given out is" in client.explain(job_id + 1).reason
    with Roost(dsn) as other:
        uncommitted = other.enqueue("a", conn=conn)
        said = client.explain(uncommitted)
        assert (said.code, said.details["open_transactions"]) == ("unknown", 1)
        assert "not committed yet (1 transaction that writes is open)" in said.reason
        conn.rollback()
    said = client.explain(uncommitted)
    assert (said.code, said.details["open_transactions"]) == ("unknown", 0)
    assert "rolled back" in said.reason
    for bad in ("1", None, 2**63):
        with pytest.raises(InvalidJobError):
            client.explain(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidJobError, match="stale_after"):
        client.explain(1, stale_after=-1)


def test_a_job_of_the_callers_transaction(dsn: str, conn: Conn) -> None:
    with Roost(dsn) as roost:
        job_id = roost.enqueue("a", conn=conn)
        assert roost.explain(job_id, conn=conn).code == "no-worker"
        assert roost.explain(job_id + 1, conn=conn).details["open_transactions"] == 0, "its own is not among them"


def test_ends(client: Roost, observer: Conn) -> None:
    completed, discarded, cancelled = (client.enqueue("a", unique_key=str(n)) for n in range(3))
    put(observer, completed, "completed")
    put(observer, discarded, "discarded")
    observer.execute("DELETE FROM roost.unique_keys WHERE job_id = %s", (discarded,))
    client.cancel(cancelled)
    assert client.explain(completed).code == "completed"
    said = client.explain(discarded)
    assert (said.code, said.command) == ("discarded", f"roostctl retry {discarded}")
    assert "attempt 20 of 20: no" in said.reason
    holder = client.enqueue("a", unique_key="1")
    assert client.explain(discarded).command == f"roostctl explain {holder}"
    client.cancel(holder)
    assert client.explain(discarded).command == f"roostctl retry {discarded}"
    assert client.retry(discarded) == "discarded"
    assert client.explain(cancelled).command == f"roostctl retry {cancelled}"
    assert client.retry(cancelled) == "cancelled"
    assert client.explain(cancelled).code == "no-worker"


def test_a_job_that_was_cancelled_for_the_sake_of_an_ancestor(client: Roost, observer: Conn) -> None:
    root = client.enqueue("a")
    middle = client.enqueue("a", depends_on=[root, client.enqueue("a")])
    leaf = client.enqueue("a", depends_on=[client.enqueue("a"), middle])
    client.cancel(root)
    for _ in range(2):
        observer.execute("SELECT roost.follow_parents()")
    said = client.explain(leaf)
    assert (said.code, said.details["dead_parents"]) == ("cancelled", [middle, root])
    assert said.command == f"roostctl retry {root} --with-dependents"
    client.retry(root, with_dependents=True)
    assert client.explain(leaf).code == "no-worker"
    assert client.explain(leaf).details["also"] == ["blocked"]


def test_what_keeps_its_ancestor_from_being_retried_is_told(client: Roost, observer: Conn) -> None:
    root = client.enqueue("a", unique_key="k")
    middle = client.enqueue("a", depends_on=[root])
    leaf = client.enqueue("a", depends_on=[middle])
    client.cancel(root)
    for _ in range(2):
        observer.execute("SELECT roost.follow_parents()")
    holder = client.enqueue("a", unique_key="k")
    said = client.explain(leaf)
    assert f"the unique_key of job {root} is now that of job {holder}" in said.reason
    assert (said.command, said.details["key_holder"]) == (f"roostctl explain {holder}", holder)
    client.cancel(holder)
    assert client.explain(leaf).command == f"roostctl retry {root} --with-dependents"


def test_a_name_in_a_command_is_what_a_shell_makes_of_it() -> None:
    for queue in ("-x", "--help", "a b'c", "a\nb", "é'\\\x1b[31m\u200b\xa0"):
        command = of(paused=PAUSED, queue=queue).command or ""
        done = subprocess.run(["bash", "-c", command.replace("roostctl", "printf %s:", 1)], capture_output=True)
        assert done.stdout.decode().removeprefix("resume:").removeprefix("--:") == f"{queue}:"


def test_an_archived_job(client: Roost, observer: Conn) -> None:
    job_id = client.enqueue("a")
    child = client.enqueue("a", depends_on=[job_id])
    client.cancel(job_id)
    observer.execute("SELECT roost.follow_parents()")
    observer.execute("UPDATE roost.job_rows SET cancelled_at = '2020-01-01Z' WHERE id = %s", (job_id,))
    observer.execute(store.SQL["archive"], {"span": 0, "age": 3600})
    said = client.explain(job_id)
    assert (said.code, said.command, said.details["archived"]) == ("cancelled", None, True)
    said = client.explain(child)
    assert (said.code, said.command, said.details["dead_parents"]) == ("cancelled", None, [job_id])


def test_an_executing_job(client: Roost, observer: Conn, add_worker: Callable[..., str]) -> None:
    job_id = client.enqueue("a")
    put(observer, job_id, "executing")
    said = client.explain(job_id)
    assert (said.code, said.command) == ("executing", "roostd -c /etc/roost.toml")
    assert "a worker that is gone" in said.reason
    worker_id = add_worker(["default"], silent_seconds=100)
    observer.execute("UPDATE roost.claims SET worker_id = %s", (worker_id,))
    assert client.cancel(job_id) == "executing"
    said = client.explain(job_id)
    assert said.details["cancel_requested"] is True
    assert said.details["worker"] == "alpha"
    assert "others take the job from" in said.reason
    assert "others take the job now" in client.explain(job_id, stale_after=50).reason


def test_queues_and_tasks_are_those_of_live_workers(
    client: Roost, observer: Conn, add_worker: Callable[..., str]
) -> None:
    job_id = client.enqueue("sned", queue="emials")
    assert client.explain(job_id).command == "roostd -c /etc/roost.toml"
    add_worker(["emials"], silent_seconds=400, name="dead")
    said = client.explain(job_id)
    assert (said.code, [each["name"] for each in said.details["stale_workers"]]) == ("no-worker", ["dead"])
    add_worker(["default", "emails"], tasks=["x"])
    said = client.explain(job_id)
    assert (said.code, said.details["nearest"]) == ("no-worker", "emails")
    assert client.explain(job_id, stale_after=500).code == "due"
    add_worker(["emials"], name="be ta", tasks=["send", "sent"], pools=[])
    said = client.explain(job_id)
    assert (said.code, said.details["nearest"]) == ("unknown-task", "send")
    assert said.command == "roostctl reload --worker 'be ta'"
    client.pause_queue("emials")
    said = client.explain(job_id)
    assert (said.code, said.details["also"]) == ("paused", ["unknown-task"])
    client.resume_queue("emials")
    observer.execute('UPDATE roost.workers SET metadata = metadata || \'{"tasks": ["sned"]}\'')
    assert client.explain(job_id).code == "due"
    observer.execute("UPDATE roost.workers SET metadata = metadata || '{\"state\": \"draining\"}', queues = '{}'")
    assert client.explain(job_id).code == "draining"


def test_busy_children_are_those_of_the_pool_that_serves_the_queue(
    client: Roost, observer: Conn, add_worker: Callable[..., str]
) -> None:
    job_id = client.enqueue("a", queue="b")
    pools = [{"queues": ["a"], "children": 5, "busy": 0}, {"queues": ["c", "b"], "children": 2, "busy": 2}]
    add_worker(["a", "b", "c"], pools=pools)
    said = client.explain(job_id)
    assert (said.code, said.details["children"], said.details["busy"]) == ("busy", 2, 2)
    assert client.explain(client.enqueue("a", queue="a")).code == "due"


def test_children_that_got_busy_since_the_last_heartbeat_are_busy(
    client: Roost, observer: Conn, add_worker: Callable[..., str]
) -> None:
    worker_id = add_worker(["a", "b"], pools=[{"queues": ["a", "b"], "children": 2, "busy": 0}])
    for busy in (1, 2, 2):
        observer.execute(
            "WITH gone AS (DELETE FROM roost.ready WHERE job_id = %s RETURNING job_id)"
            " INSERT INTO roost.claims (job_id, lease, worker_id, attempt) SELECT job_id, job_id, %s, 1 FROM gone",
            (client.enqueue("a", queue="a"), worker_id),
        )
        waiting = client.enqueue("a", queue="a", priority=-busy)
        said = client.explain(waiting)
        assert (said.code, said.details["busy"]) == ("busy" if busy == 2 else "due", busy)
        client.cancel(waiting)


def test_parents_are_shown_as_they_are_and_counted(
    client: Roost, observer: Conn, add_worker: Callable[..., str]
) -> None:
    add_worker(["default"])
    parents = [client.enqueue("a", queue="q") for _ in range(13)]
    child = client.enqueue("b", depends_on=parents)
    put(observer, parents[-1], "executing")
    put(observer, parents[-2], "completed")
    observer.execute("SELECT roost.after_end(%s)", (parents[-2:-1],))
    said = client.explain(child)
    assert (said.code, said.details["count"]) == ("blocked", 13), "it has not been told of the end yet"
    observer.execute("SELECT roost.follow_parents()")
    said = client.explain(child)
    assert (said.code, said.details["count"]) == ("blocked", 12)
    assert said.details["parents"] == [
        *({"id": parent, "state": "available"} for parent in parents[2:-2]),
        {"id": parents[-1], "state": "executing"},
    ]
    assert said.reason.endswith("and 2 more")
    assert said.command == f"roostctl explain {parents[2]}"


def test_times(client: Roost, observer: Conn, add_worker: Callable[..., str]) -> None:
    add_worker(["default"])
    later = client.enqueue("a", scheduled_at=datetime.now(UTC) + timedelta(hours=5, minutes=1))
    said = client.explain(later)
    assert (said.code, said.command) == ("scheduled", f"roostctl retry {later}")
    assert said.reason.endswith("in 5 hours")
    failed = client.enqueue("a")
    put(observer, failed, "retryable")
    observer.execute('UPDATE roost.job_rows SET errors = \'[{"error": "X: y"}]\' WHERE id = %s', (failed,))
    said = client.explain(failed)
    assert (said.code, said.details["error"]) == ("retry-backoff", "X: y")
    for job_id in (later, failed):
        client.retry(job_id)
    assert {client.explain(later).code, client.explain(failed).code} == {"behind", "due"}


def test_throttles(client: Roost, observer: Conn, add_worker: Callable[..., str]) -> None:
    add_worker(["default"])
    observer.execute(
        "INSERT INTO roost.throttles (task, rate_per_minute, max_concurrency, limited_since, counted)"
        " VALUES ('slow', NULL, 2, '-infinity', true), ('rated', 3, NULL, '-infinity', true)"
    )
    slow, rated = client.enqueue("slow"), client.enqueue("rated")
    assert client.explain(slow).code == "due"
    assert client.explain(rated).code == "due"
    observer.execute(
        "INSERT INTO roost.claims (job_id, lease, worker_id, attempt, task)"
        " SELECT -n, n, gen_random_uuid(), 1, 'slow' FROM generate_series(1, 2) AS n"
    )
    said = client.explain(slow)
    assert (said.code, said.details["limits"], said.details["running"]) == ("throttled", ["max_concurrency"], 2)
    observer.execute(
        "INSERT INTO roost.throttle_starts (task, at, starts)"
        " VALUES ('rated', now() - interval '10 s', 1), ('rated', now(), 2), ('rated', now() - interval '62 s', 9)"
    )
    said = client.explain(rated)
    assert (said.code, said.details["limits"], said.details["starts"]) == ("throttled", ["rate_per_minute"], 3)
    next_in = (datetime.fromisoformat(said.details["next_at"]) - datetime.now(UTC)).total_seconds()
    assert 0 < next_in <= 51
    # Runs from before the limit was there don't name their task.
    observer.execute("DELETE FROM roost.claims")
    running = [client.enqueue("slow") for _ in range(2)]
    for job_id in running:
        put(observer, job_id, "executing")
        observer.execute("DELETE FROM roost.throttled WHERE job_id = %s", (job_id,))
    assert client.explain(slow).code == "due"
    observer.execute("UPDATE roost.throttles SET counted = false")
    assert client.explain(slow).details["running"] == 2


def test_the_jobs_before_one_are_counted_up_to_a_bound(
    client: Roost, observer: Conn, add_worker: Callable[..., str]
) -> None:
    add_worker(["default"])
    first = client.enqueue("a")
    client.enqueue("a", queue="other", priority=-5)
    last = client.enqueue("a", priority=1)
    assert client.explain(first).code == "due"
    said = client.explain(last)
    assert (said.code, said.details["ahead"]) == ("behind", 1)
    client.enqueue_many([JobInsert("a")] * (MAX_AHEAD + 5))
    said = client.explain(last)
    assert said.reason.startswith("more than 10,000 jobs of its queue come before it")
    observer.execute("INSERT INTO roost.throttles (task, rate_per_minute, limited_since) VALUES ('b', 9, '-infinity')")
    one, two = client.enqueue("b", priority=-1), client.enqueue("b", priority=-1)
    assert [client.explain(each).details["ahead"] for each in (one, two)] == [0, 1]


def test_what_reads_much_goes_by_an_index_and_stops_at_a_bound(roost: Roost, observer: Conn) -> None:
    """Whatever the planner believes: the tables were empty when they were last looked at, or hold many small queues."""
    for table in ("ready", "job_rows", "dependencies"):
        observer.execute(f"ALTER TABLE roost.{table} SET (autovacuum_enabled = off)".encode())
    observer.execute("ANALYZE")
    roost.enqueue_many([JobInsert("a")] * 3000)
    parents = [job.id for job in roost.list_jobs(limit=300)]
    observer.execute("INSERT INTO roost.throttles (task, max_concurrency, limited_since) VALUES ('b', 1, '-infinity')")
    ids = [roost.enqueue("a"), roost.enqueue("a", priority=-1), roost.enqueue("a", depends_on=parents)]
    ids.append(roost.enqueue("b"))
    observer.execute(
        "INSERT INTO roost.claims (job_id, lease, worker_id, attempt)"
        " SELECT n, n, gen_random_uuid(), 1 FROM unnest(%s::bigint[]) AS n",
        (parents,),
    )
    for _ in range(2):
        observer.execute(
            "INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)"
            " SELECT 'default', 0, now() - interval '1 hour', -n FROM generate_series(1, 150000) AS n"
            " UNION ALL SELECT 'q' || n, 0, now(), -n FROM generate_series(1, 3000) AS n"
            " ON CONFLICT DO NOTHING"
        )
        observer.execute(
            "INSERT INTO roost.dependencies SELECT -n, -n FROM generate_series(1, 5000) AS n ON CONFLICT DO NOTHING"
        )
        for job_id in ids:
            parameters = statements.explain(job_id, 300).parameters
            [row] = observer.execute(b"EXPLAIN (ANALYZE, FORMAT JSON) " + FACTS.encode(), parameters).fetchall()
            for node in nodes(row["QUERY PLAN"][0]["Plan"]):
                read = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
                assert read <= MAX_AHEAD + 1, node
                if node["Node Type"] == "Seq Scan" and node["Actual Loops"]:
                    assert node["Relation Name"] not in ("ready", "job_rows", "dependencies"), node
        observer.execute("ANALYZE")


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for each in plan.get("Plans", ()) for node in nodes(each))]
