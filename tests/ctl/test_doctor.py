"""doctor, on databases with something wrong, and behind a real PgBouncer."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from roost_client import JobInsert, Roost
from roostd.config import DatabaseConfig, load
from roostd.ctl import doctor
from roostd.embedded import EmbeddedPostgres
from tests.bouncer import Bouncer, needs_pgbouncer
from tests.conftest import FAST
from tests.ctl.conftest import Ctl

DOCUMENT = Path(__file__).parents[2] / "docs" / "privileges.md"
ROLE = "doctor_test"


@pytest.fixture
def conn(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture
def find(dsn: str) -> Callable[..., list[doctor.Found]]:
    """Makes one check, on the test's database or the one given."""

    def find(check: Callable[[doctor.Patient], Iterator[doctor.Found]], conninfo: str = dsn) -> list[doctor.Found]:
        patient = doctor.Patient(conninfo, load(None, environ={}, flags={"database.dsn": conninfo}).config)
        with patient.conn:
            return [doctor.Found(*each[1:]) for each in map(_values, doctor._examine("", check, patient))]

    return find


def _values(finding: doctor.Finding) -> tuple[Any, ...]:
    return finding.check, finding.verdict, finding.found, finding.fix


Find = Callable[..., list[doctor.Found]]


@contextmanager
def role(conn: psycopg.Connection[Any], *grants: str) -> Iterator[str]:
    """A role of the server's, with what it may."""
    conn.execute(f"CREATE ROLE {ROLE} LOGIN".encode())
    try:
        for grant in grants:
            conn.execute(grant.encode())
        yield ROLE
    finally:
        conn.execute(f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}".encode())


def add_worker(conn: psycopg.Connection[Any], *queues: str, silent_seconds: float = 0, **metadata: Any) -> None:
    conn.execute(
        "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, last_seen_at, metadata)"
        " VALUES (%s, 'alpha', 'web1', 1, %s, 4, now() - make_interval(secs => %s), %s)",
        (uuid4(), list(queues), silent_seconds, json.dumps(metadata)),
    )


def test_a_healthy_database_and_what_is_printed(ctl: Ctl, conn: psycopg.Connection[Any]) -> None:
    add_worker(conn, "default", tasks=["a"])
    found = ctl("doctor", "--json")
    assert [each["check"] for each in found.json] == [name for name, _ in doctor.CHECKS]
    assert {each["verdict"] for each in found.json} == {"ok"}, found.out
    assert found.code == 0
    conn.execute("DELETE FROM roost.workers")
    printed = ctl("doctor")
    assert printed.code == 0, "a warning is no failure"
    assert printed.lines[0].startswith("ok       database ")
    at = next(n for n, line in enumerate(printed.lines) if line.startswith("warning"))
    assert printed.lines[at].split(None, 2) == ["warning", "workers", "no live worker: nothing runs"]
    assert printed.lines[at + 1].split() == ["→", "roostd", "-c", "/etc/roost.toml"]
    with Roost(conn.info.dsn) as roost:
        roost.enqueue("a")
    assert ctl("doctor").code == 1


def test_without_a_database_it_ends_with_69(bare_ctl: Ctl) -> None:
    result = bare_ctl("doctor", "--json", "--dsn", "host=/nowhere password=s3cret")
    assert (result.code, [(each["check"], each["verdict"]) for each in result.json]) == (69, [("database", "failure")])
    assert "s3cret" not in result.out + result.err


def test_a_schema_that_is_missing_outdated_or_newer(bare_ctl: Ctl, find: Find, empty_dsn: str) -> None:
    result = bare_ctl("doctor", "--json", "--dsn", empty_dsn)
    told = {each["check"]: each for each in result.json}
    assert (result.code, told["schema"]["verdict"]) == (1, "failure")
    assert (told["schema"]["found"], told["schema"]["fix"]) == ("the schema is not there", "roostctl migrate up")
    assert told["queues"]["found"].startswith("it could not be told: relation")
    with Roost(empty_dsn) as roost, psycopg.connect(empty_dsn, autocommit=True) as conn:
        roost.setup_schema()
        assert [each.verdict for each in find(doctor.schema_version, empty_dsn)] == ["ok"]
        conn.execute("DELETE FROM roost.migrations WHERE version >= 5")
        [found] = find(doctor.schema_version, empty_dsn)
        assert re.fullmatch("migrations 0005, 0006.* are not applied", found.found)
        conn.execute("INSERT INTO roost.migrations (version, name, checksum) VALUES (999, 'later', '')")
        conn.execute("UPDATE roost.migrations SET checksum = '' WHERE version = 2")
        assert [(each.verdict, each.found.split()[1]) for each in find(doctor.schema_version, empty_dsn)] == [
            ("failure", "0999"),
            ("failure", "0002"),
            ("failure", "0005,"),
        ]


def test_what_a_role_may_do(find: Find, dsn: str, conn: psycopg.Connection[Any]) -> None:
    [found] = find(doctor.rights)
    assert found.verdict == "ok"
    as_role = make_conninfo(dsn, user=ROLE)
    with role(conn):
        [found] = find(doctor.rights, as_role)
        assert (found.verdict, found.found) == ("failure", f"role {ROLE} may not use the schema roost")
        [found] = find(doctor.schema_version, as_role)
        assert found.verdict == "warning"
        assert found.found.startswith("this role may not look: permission denied")
        conn.execute(f"GRANT USAGE ON SCHEMA roost TO {ROLE}".encode())
        [found] = find(doctor.rights, as_role)
        assert found.verdict == "failure"
        assert "lacks INSERT on roost.job_rows, SELECT on roost.job_rows (id)" in found.found
    # With what the document grants, and no more, it says what the document says.
    grants = re.search(r"```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert grants is not None
    statements = [each for each in grants[1].replace("TO app", f"TO {ROLE}").split(";") if each.strip()]
    with role(conn, *statements):
        [found] = find(doctor.rights, as_role)
        assert found.verdict == "warning"
        assert f"role {ROLE} may enqueue, but not look after jobs, nor run them: it lacks DELETE" in found.found
        for statement in statements[1:]:
            conn.execute(re.sub("TO (?=doctor)", "FROM ", statement.replace("GRANT", "REVOKE")).encode())
            [found] = find(doctor.rights, as_role)
            assert found.verdict == "failure", statement
            conn.execute(statement.encode())


def test_a_role_that_may_not_look_gets_warnings_and_all_checks(
    bare_ctl: Ctl, dsn: str, conn: psycopg.Connection[Any]
) -> None:
    with role(conn):
        result = bare_ctl("doctor", "--json", "--dsn", make_conninfo(dsn, user=ROLE))
    told = {each["check"]: each for each in result.json}
    assert list(told) == [name for name, _ in doctor.CHECKS]
    assert {name for name, each in told.items() if each["verdict"] == "failure"} == {"rights"}
    assert "of other roles can't be looked into" in told["transactions"]["found"]


def test_a_transaction_that_holds_back_vacuum(
    find: Find, dsn: str, conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(psycopg.connect(dsn, application_name="the report")) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        pid = old.info.backend_pid
        assert [each.verdict for each in find(doctor.transactions)] == ["ok"]
        assert [each.verdict for each in find(doctor.idle_in_transaction)] == ["ok"]
        monkeypatch.setattr(doctor, "OLD_SECONDS", 0.0)
        monkeypatch.setattr(doctor, "IDLE_SECONDS", 0.0)
        [found] = [each for each in find(doctor.transactions) if str(pid) in each.found]
        assert found.verdict == "warning"
        assert f"pid {pid} (the report, role {old.info.user}) has had a transaction open for" in found.found
        [found] = [each for each in find(doctor.idle_in_transaction) if str(pid) in each.found]
        assert (found.verdict, "(the report" in found.found) == ("warning", True)
        monkeypatch.setattr(doctor, "VERY_OLD_SECONDS", 0.0)
        [found] = [each for each in find(doctor.transactions) if str(pid) in each.found]
        assert (found.verdict, found.fix) == ("failure", f"SELECT pg_terminate_backend({pid})")
        conn.execute(f"{found.fix}".encode())  # what it says helps
        assert not [each for each in find(doctor.transactions) if str(pid) in each.found]


def test_a_prepared_transaction_and_settings_of_the_server(monkeypatch: pytest.MonkeyPatch, find: Find) -> None:
    settings = {**FAST, "max_prepared_transactions": "2", "max_connections": "20", "autovacuum": "off"}
    monkeypatch.setattr(doctor, "OLD_SECONDS", 0.0)
    with (
        tempfile.TemporaryDirectory(prefix="roost-test-") as directory,
        EmbeddedPostgres(directory, settings=settings) as server,
        Roost(server.dsn) as roost,
        psycopg.connect(server.dsn, autocommit=True) as conn,
    ):
        roost.setup_schema()
        conn.execute("BEGIN; INSERT INTO roost.queues VALUES ('q'); PREPARE TRANSACTION 'it''s'")
        [found] = [each for each in find(doctor.transactions, server.dsn) if "prepared" in each.found]
        assert found.fix == "ROLLBACK PREPARED 'it''s', or COMMIT PREPARED"
        conn.execute("ROLLBACK PREPARED 'it''s'")
        [found] = find(doctor.vacuum, server.dsn)
        assert (found.verdict, found.fix) == ("failure", "ALTER SYSTEM SET autovacuum = on")
        for _ in range(4):
            add_worker(conn, "default")
        [found] = find(doctor.connections, server.dsn)
        assert (found.verdict, found.found.split("; ")[1]) == ("failure", "4 workers may need 20: too many")
        conn.execute("DELETE FROM roost.workers")
        [found] = find(doctor.connections, server.dsn)
        assert found.verdict == "ok"
        others = [psycopg.connect(server.dsn) for _ in range(12)]
        [found] = find(doctor.connections, server.dsn)
        assert (found.verdict, "one more worker may find none" in found.found) == ("warning", True)
        for other in others:
            other.close()
        conn.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        conn.execute("SELECT pg_reload_conf()")
        assert [each.verdict for each in find(doctor.server, server.dsn)] == ["ok", "failure"]


def test_tables_that_vacuum_does_not_keep_up_with(
    find: Find, conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute("ALTER TABLE roost.ready SET (autovacuum_enabled = off)")
    [found] = find(doctor.vacuum)
    assert (found.verdict, found.fix) == ("failure", "ALTER TABLE roost.ready RESET (autovacuum_enabled)")
    conn.execute(
        "INSERT INTO roost.ready (queue, priority, scheduled_at, job_id) SELECT 'q', 0, now(), n"
        " FROM generate_series(1, 100) AS n"
    )
    conn.execute("DELETE FROM roost.ready WHERE job_id > 10")
    conn.execute("SELECT pg_stat_force_next_flush()" if conn.info.server_version >= 150000 else "ANALYZE roost.ready")
    monkeypatch.setattr(doctor, "DEAD_ROWS", 50)
    [found] = [each for each in find(doctor.vacuum) if each.verdict == "warning"]
    assert found.found == "roost.ready has 90 dead rows beside 10; autovacuum was there never"
    conn.execute("VACUUM roost.ready")
    conn.execute("ALTER TABLE roost.ready RESET (autovacuum_enabled)")
    assert [each.verdict for each in find(doctor.vacuum)] == ["ok"]


def test_clocks(find: Find, conn: psycopg.Connection[Any]) -> None:
    add_worker(conn, "default")  # which doesn't tell
    conn.execute("INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, metadata)"
                 " SELECT gen_random_uuid(), name, 'web2', 1, '{}', 1,"
                 "        json_build_object('clock', extract(epoch FROM now()) + skew)"
                 "   FROM (VALUES ('right', 1), ('fast', 60), ('slow', -3600)) AS w(name, skew)")  # fmt: skip
    assert [each.found.split(":")[0] for each in find(doctor.clocks)] == [
        "the clock of worker fast on web2 is 60 s ahead of the database's",
        "the clock of worker slow on web2 is 3600 s behind the database's",
    ]
    conn.execute("DELETE FROM roost.workers WHERE name IN ('fast', 'slow')")
    assert [each.verdict for each in find(doctor.clocks)] == ["ok"]


def test_stale_workers(find: Find, conn: psycopg.Connection[Any]) -> None:
    add_worker(conn, "default", silent_seconds=400)
    assert [each.verdict for each in find(doctor.workers)] == ["warning", "warning"]
    add_worker(conn, "default", state="draining")
    stale, live = find(doctor.workers)
    assert stale.found == "worker alpha on web1 was last heard of 6 minutes ago; the others free its jobs"
    assert (live.verdict, live.found) == ("ok", "1 worker on 1 host, 1 of them about to end")


def test_queues_that_nobody_serves_or_may(find: Find, dsn: str, conn: psycopg.Connection[Any], ctl: Ctl) -> None:
    with Roost(dsn) as roost:
        roost.enqueue_many([JobInsert("a", queue=f"q{n}") for n in range(3)] + [JobInsert("a", queue="emials")] * 2)
        conn.execute("INSERT INTO roost.throttles (task, rate_per_minute) VALUES ('slow', 1)")
        roost.enqueue("slow", queue="emials")
        conn.execute(
            "INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue)"
            " VALUES (now() - interval '3 hours', -1, 0, 'late'), (now() + interval '3 hours', -2, 0, 'later')"
        )
        add_worker(conn, "late", state="draining")
        assert {each.fix for each in find(doctor.queues)} == {"roostd -c /etc/roost.toml"}
        add_worker(conn, "emails", "q0", "q1", "q2")
        roost.pause_queue("q1")
        emials, late, paused = find(doctor.queues)
        assert emials.verdict == late.verdict == "failure"
        assert re.fullmatch(
            r"queue 'emials' has 3 due jobs, the oldest for \d+ s, and no live worker serves it;"
            r" did you mean 'emails'\?",
            emials.found,
        )
        assert emials.fix == "add it to the queues of a pool, then roostctl reload --worker alpha"
        assert late.found.startswith("queue 'late' has 1 due job, the oldest for 3 hours,")
        assert (paused.verdict, paused.fix) == ("warning", "roostctl resume q1")
        assert paused.fix is not None
        assert ctl(*paused.fix.split()[1:]).code == 0
        add_worker(conn, "emials", "late")
        assert [(each.verdict, each.found) for each in find(doctor.queues)] == [
            ("ok", "5 queues with due jobs, all served")
        ]
        roost.enqueue_many([JobInsert("a", queue="many")] * (doctor.MOST_ROWS + 1))
        roost.enqueue_many([JobInsert("a", queue=f"many{n}") for n in range(20)])
        found = find(doctor.queues)
        assert "queue 'many' has more than 10,000 due jobs" in found[0].found
        assert (len(found), found[-1].found) == (doctor.SHOWN + 1, "and 11 more of the kind")


def test_tasks_that_nobody_knows(find: Find, dsn: str, conn: psycopg.Connection[Any]) -> None:
    with Roost(dsn) as roost:
        conn.execute("INSERT INTO roost.throttles (task, rate_per_minute) VALUES ('slow', 1)")
        for task in ("send", "sned", "sned", "slow"):
            roost.enqueue(task)
        conn.execute("SELECT roost.enqueue('failed', scheduled_at => now() + interval '1 hour')")
        roost.enqueue("elsewhere", queue="unserved")
        add_worker(conn, "default", tasks=["send"])
        found = find(doctor.tasks)
        assert [each.found.split("task ")[1] for each in found] == [
            "'failed', of which at least 1 job waits",
            "'slow', of which at least 1 job waits",
            "'sned', of which at least 2 jobs wait; did you mean 'send'?",
        ]
        assert {each.fix for each in found} == {
            "add its module to handlers.modules, then roostctl reload --worker alpha"
        }
        add_worker(conn, "default")  # of an older version: it may know anything
        assert [each.verdict for each in find(doctor.tasks)] == ["ok"]


@needs_pgbouncer
def test_a_pooler_in_either_mode(bouncer: Bouncer, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(doctor.pooler) == [doctor.Found("ok", "no pooler stands before the server")]
    [found] = find(doctor.pooler, bouncer.dsn)
    assert found.verdict == "warning"
    assert "no notification gets through" in found.found
    assert found.fix is not None
    assert "database.listen_dsn" in found.fix

    def set_up(mode: str, size: int) -> None:
        bouncer.kill()
        file = Path(str(conninfo_to_dict(bouncer.dsn)["host"])) / "pgbouncer.ini"
        text = re.sub("pool_mode = .*", f"pool_mode = {mode}", file.read_text())
        file.write_text(re.sub("default_pool_size = .*", f"default_pool_size = {size}", text))
        bouncer.start()

    set_up("session", 3)
    assert find(doctor.pooler, bouncer.dsn) == [
        doctor.Found("ok", "a pooler stands before the server, in session mode")
    ]
    set_up("transaction", 1)
    assert "no notification gets through" in find(doctor.pooler, bouncer.dsn)[0].found
    set_up("session", 2)  # one too few to look
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.5)
    [found] = find(doctor.pooler, bouncer.dsn)
    assert (found.verdict, "no answer within 0.5 s" in found.found) == ("warning", True)


@needs_pgbouncer
@pytest.mark.skipif("listen_dsn" not in DatabaseConfig.__dataclass_fields__, reason="there is no such setting")
def test_where_a_direct_connection_is_named_it_is_tried(
    bouncer: Bouncer, bare_ctl: Ctl, dsn: str, tmp_path: Path
) -> None:
    config = tmp_path / "roost.toml"
    found = []
    for listen_dsn in (dsn, bouncer.dsn, "host=/nowhere"):
        config.write_text(f"[database]\ndsn = {json.dumps(bouncer.dsn)}\nlisten_dsn = {json.dumps(listen_dsn)}\n")
        told = {each["check"]: each for each in bare_ctl("doctor", "--json", "-c", config).json}
        found.append((told["pooler"]["verdict"], told["pooler"]["found"].rpartition("database.listen_dsn ")[2][:14]))
    assert found == [("ok", "leads to the s"), ("failure", "leads to one, "), ("failure", "can't be used:")]


@needs_pgbouncer
def test_all_checks_work_through_a_pooler(bouncer: Bouncer, bare_ctl: Ctl, conn: psycopg.Connection[Any]) -> None:
    add_worker(conn, "default", tasks=[])
    result = bare_ctl("doctor", "--json", "--dsn", bouncer.dsn)
    assert {each["check"] for each in result.json if each["verdict"] != "ok"} == {"pooler"}, result.out
    assert result.code == 0


def test_a_check_that_takes_too_long_is_a_warning(dsn: str, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_STATEMENT_SECONDS", 0.1)

    def slow(patient: doctor.Patient) -> Iterator[doctor.Found]:
        patient.rows("SELECT pg_sleep(60)")
        yield doctor.Found("ok", "")

    assert find(slow) == [doctor.Found("warning", "it could not be told within 0.1 s")]
