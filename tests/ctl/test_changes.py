"""cancel, retry, requeue."""

import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg import sql

from roost_client import Roost
from tests.ctl.conftest import COMMAND, Ctl
from tests.system.daemon import eventually

LATER = datetime(2040, 1, 1, tzinfo=UTC)


def test_cancel_goes_through_all_ids_and_ends_with_1_if_any_cannot_be(
    ctl: Ctl, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    waiting, later = roost.enqueue("send"), roost.enqueue("send", scheduled_at=LATER)
    [discarded] = discard()
    result = ctl("cancel", waiting, 4711, discarded, later)
    assert result.code == 1
    assert [line.split() for line in result.lines[1:]] == [[str(waiting), "cancelled"], [str(later), "cancelled"]]
    assert result.err.splitlines() == [
        "roostctl: cannot cancel job 4711: there is no such job",
        f"roostctl: cannot cancel job {discarded}: it is discarded already",
    ]
    assert ctl("cancel", waiting, "--json").json == [{"id": waiting, "outcome": "cancelled"}]


def test_retry_makes_a_job_due_and_refuses_one_that_cannot_be(
    ctl: Ctl, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    later = roost.enqueue("send", scheduled_at=LATER)
    [discarded] = discard()
    result = ctl("retry", later, discarded)
    assert result.code == 0
    assert result.lines[1:] == [f" {later}  available, was available", f" {discarded}  available, was discarded"]
    assert roost.get_job(later).scheduled_at < LATER
    assert (roost.get_job(discarded).state, roost.get_job(discarded).attempt) == ("available", 0)
    assert ctl("retry", 4711).code == 1


@pytest.mark.parametrize("command", ["cancel", "retry"])
def test_an_id_that_is_none_is_wrong_usage(ctl: Ctl, command: str) -> None:
    assert ctl(command, "x").code == 64
    assert ctl(command, 2**63).code == 64
    assert ctl(command).code == 64


def test_requeue_asks_for_what_it_is_to_requeue(ctl: Ctl, discard: Callable[..., list[int]]) -> None:
    discard()
    result = ctl("requeue", "--yes")
    assert result.code == 64
    assert "--discarded" in result.err


def test_requeue_lets_all_that_match_start_again(ctl: Ctl, roost: Roost, discard: Callable[..., list[int]]) -> None:
    for queue in ("emails", "images"):
        for task in ("send", "resize"):
            discard(3, queue, task)
    assert (
        ctl("requeue", "--discarded", "--queue", "emails", "--task", "send", "--dry-run").out
        == "would requeue 3 jobs, such as 1, 2, 3\n"
    )
    dry = ctl("requeue", "--discarded", "--limit", 5, "--dry-run", "--json").json
    assert dry == {"outcome": "would requeue", "jobs": 5, "sample": [1, 2, 3, 4, 5]}
    assert len(roost.list_jobs(state="discarded")) == 12
    assert ctl("requeue", "--discarded", "--queue", "emails", "--task", "send", "--yes").out == "requeued 3 jobs\n"
    assert {(job.queue, job.task, job.attempt) for job in roost.list_jobs(state="available")} == {("emails", "send", 0)}
    assert ctl("requeue", "--discarded", "--limit", 2, "--yes").out == "requeued 2 jobs\n"
    nobody = {"duplicates": 0, "dead_parents": 0, "held": 0}
    assert ctl("requeue", "--discarded", "--yes", "--json").json == {
        "outcome": "requeued",
        "jobs": 7,
        "skipped": nobody,
    }
    result = ctl("requeue", "--discarded", "--yes")
    assert (result.code, result.out) == (1, "")
    assert "no discarded job matches" in result.err


def test_requeue_takes_the_filters_of_jobs(ctl: Ctl, roost: Roost, discard: Callable[..., list[int]], dsn: str) -> None:
    [old] = discard(errors=[{"error": "ConnectionError: refused"}])
    [tagged] = discard(errors=[{"error": "KeyError: 7"}])
    discard()
    with psycopg.connect(dsn) as conn:
        conn.execute("UPDATE roost.job_rows SET inserted_at = now() - interval '3 days' WHERE id = %s", (old,))
        conn.execute("UPDATE roost.job_rows SET tags = '{a,b}' WHERE id = %s", (tagged,))

    def requeued(*options: object) -> object:
        dry = ctl("requeue", "--discarded", "--dry-run", "--json", *options).json["sample"]
        assert ctl("requeue", "--discarded", "--yes", *options).code == 0
        found = [job.id for job in roost.list_jobs(state="available")]
        assert found == dry
        for job_id in found:
            roost.cancel(job_id)
        return found

    assert requeued("--older-than", "2d") == [old]
    assert requeued("--tag", "b", "--newer-than", "48h", "--error", "keyerror") == [tagged]
    assert requeued() == [tagged + 1]


def test_requeue_says_what_it_skips_and_goes_on(
    ctl: Ctl, roost: Roost, discard: Callable[..., list[int]], dsn: str
) -> None:
    """Whose key is taken, by a job that is active or by an open transaction; whose parent is dead; what others hold."""
    ids = discard(6)
    [parent] = discard(queue="parents")
    with psycopg.connect(dsn) as conn, psycopg.connect(dsn) as other:
        for job_id, column, value in (
            (ids[0], "unique_key", "taken"),
            (ids[1], "unique_key", "open"),
            (ids[2], "unique_key", "free"),
            (ids[3], "unique_key", "free"),
            (ids[4], "depends_on", [parent]),
        ):
            query = sql.SQL("UPDATE roost.job_rows SET {} = %s WHERE id = %s").format(sql.Identifier(column))
            conn.execute(query, (value, job_id))
        conn.commit()
        roost.enqueue("a", unique_key="taken")
        roost.enqueue("a", unique_key="open", conn=other)
        result = ctl("requeue", "--discarded", "--queue", "default", "--yes", "--json")
        assert result.code == 0
        assert result.json == {
            "outcome": "requeued",
            "jobs": 2,
            "skipped": {"duplicates": 2, "dead_parents": 1, "held": 1},
        }
        assert {roost.get_job(job_id).state for job_id in (ids[2], ids[5])} == {"available"}
        other.rollback()
    assert sorted(ctl("requeue", "--discarded", "--queue", "default", "--yes").lines) == [
        "requeued 1 job",
        "skipped 1 job: a job that they depend on was discarded or cancelled",
        "skipped 2 jobs: an active job has their unique key",
    ]
    again = ctl("requeue", "--discarded", "--queue", "default", "--yes")
    assert (again.code, again.lines[0]) == (1, "requeued 0 jobs")


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_requeue_refuses_where_there_is_nobody_to_ask(
    ctl_process: Callable[..., subprocess.CompletedProcess[str]],
    roost: Roost,
    discard: Callable[..., list[int]],
    answer: str,
) -> None:
    discard(2)
    result = ctl_process("$roostctl requeue --discarded", input=answer)
    assert (result.returncode, result.stdout) == (64, "")
    assert "cannot requeue 2 discarded jobs without a question, and no terminal is there to ask on" in result.stderr
    assert "--yes" in result.stderr
    assert len(roost.list_jobs(state="discarded")) == 2


def test_an_interrupted_cancel_tells_what_it_did(dsn: str, roost: Roost) -> None:
    first, second = roost.enqueue("send"), roost.enqueue("send")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%roost.cancel%'"
    with psycopg.connect(dsn) as blocker, psycopg.connect(dsn, autocommit=True) as observer:
        blocker.execute("SELECT FROM roost.job_rows WHERE id = %s FOR UPDATE", [second])
        with subprocess.Popen(
            [COMMAND, "--dsn", dsn, "cancel", str(first), str(second)], stdout=subprocess.PIPE, text=True
        ) as process:
            eventually(lambda: observer.execute(waiting).fetchone() == (1,), "cancel that waits")
            process.send_signal(signal.SIGINT)
            shown, _ = process.communicate(timeout=30)
    assert (process.returncode, shown.splitlines()[1:]) == (130, [f" {first}  cancelled"])
    assert (roost.get_job(first).state, roost.get_job(second).state) == ("cancelled", "available")


def test_an_interrupted_requeue_has_done_what_it_did_and_another_goes_on(
    dsn: str, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    discard(3500)
    with psycopg.connect(dsn) as blocker:
        # The third batch waits here, where its interrupt finds it: no lock of a row would keep it waiting.
        blocker.execute(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN IF NEW.job_id = 2500 THEN PERFORM pg_advisory_xact_lock(4711); END IF; RETURN NEW; END$$"
        )
        blocker.execute("CREATE TRIGGER hold BEFORE INSERT ON roost.ready FOR EACH ROW EXECUTE FUNCTION hold()")
        blocker.commit()
        blocker.execute("SET lock_timeout = 0; SELECT pg_advisory_lock(4711)")
        blocker.execute("ALTER FUNCTION roost.requeue(bigint[]) RESET lock_timeout")
        blocker.commit()
        process = subprocess.Popen(
            [COMMAND, "--dsn", dsn, "requeue", "--discarded", "--yes"], stderr=subprocess.PIPE, text=True
        )
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        eventually(lambda: blocker.execute(waiting).fetchone() == (1,), "batch that waits")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "at least 2000 jobs were requeued before" in told
        blocker.execute("DROP TRIGGER hold ON roost.ready")
        blocker.commit()
    assert roost.list_queues()[0].available == 2000
    assert roost.requeue_discarded() == 1500
