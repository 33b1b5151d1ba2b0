"""What is wrong with a configuration is told in one message that names the source, the key and the fix."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from roostd.config import ConfigError, load

ENVIRON = {"ROOST_DSN": "postgresql:///app"}


def problems(
    path: Path | None, environ: dict[str, str] | None = None, flags: dict[str, object] | None = None
) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path, environ=ENVIRON if environ is None else environ, flags=flags or {})
    assert caught.value.exit_code == 78
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return caught.value.problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "roost.toml"


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("[worker]\npol_interval = 1", "worker.pol_interval", "did you mean worker.poll_interval?"),
        ("[worker]\nhearbeat_intervall = 1", "worker.hearbeat_intervall", "did you mean worker.heartbeat_interval?"),
        ("[worker]\nconcurrency = 1", "worker.concurrency", "did you mean pools.NAME.concurrency?"),
        ("[worker]\nconcurency = 1", "worker.concurency", "did you mean pools.NAME.concurrency?"),
        ("[databse]\ndsn = 'x'", "databse", "did you mean database?"),
        ("[pool.default]\nqueues = ['x']", "pool", "did you mean pools?"),
        ("dsn = 'x'", "dsn", "did you mean database.dsn?"),
        ("[pools.default]\nqueue = ['x']", "pools.default.queue", "did you mean pools.default.queues?"),
        ("[handlers]\nmodule = ['x']", "handlers.module", "did you mean handlers.modules?"),
        ("[worker.retry_strategy]\nbse = 1", "worker.retry_strategy.bse", "did you mean worker.retry_strategy.base?"),
        ("[cron.x]\nexpresion = '@daily'", "cron.x.expresion", "did you mean cron.x.expression?"),
        ("[cron.x]\ntime_zone = 'UTC'", "cron.x.time_zone", "did you mean cron.x.timezone?"),
        ("[crons.x]\ntask = 'x'", "crons", "did you mean cron?"),
        ("[worker]\nruncron = false", "worker.runcron", "did you mean worker.run_cron?"),
        ("[log]\nxyzzy = 1", "log.xyzzy", "there are log.level, log.format"),
        ('[log]\n"a\\nb" = 1', r"log.'a\nb'", "there are log.level, log.format"),
        ("[log]\n'' = 1", "log.''", "there are log.level, log.format"),
        ("[worker]\nname.x.y.z = 1", "worker.name", "a table"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(file: Path, text: str, key: str, meant: str) -> None:
    file.write_text(text)
    (problem,) = problems(file)
    assert key in problem
    assert str(file) in problem
    assert meant in problem


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("ROOST_WORKER__POL_INTERVAL", "did you mean ROOST_WORKER__POLL_INTERVAL?"),
        ("ROOST_WORKR__NAME", "did you mean ROOST_WORKER?"),
        ("ROOST_X__Y", "there are ROOST_DATABASE, ROOST_WORKER, "),
        ("ROOST_POOLS__DEFAULT__QUEUE", "did you mean ROOST_POOLS__DEFAULT__QUEUES?"),
        ("ROOST___NAME", "there are ROOST_DATABASE"),
    ],
)
def test_an_unknown_variable_is_named_with_the_nearest_valid_one(variable: str, meant: str) -> None:
    (problem,) = problems(None, {**ENVIRON, variable: "1"})
    assert f"environment {variable}" in problem
    assert meant in problem


A_NUMBER = "expected a number of seconds"


@pytest.mark.parametrize(
    ("section", "line", "shown", "expected"),
    [
        ("worker", "poll_interval = '1'", "worker.poll_interval = '1'", A_NUMBER),
        ("worker", "poll_interval = true", "worker.poll_interval = True", A_NUMBER),
        ("worker", "poll_interval = 0", "worker.poll_interval = 0", "above 0"),
        ("worker", "poll_interval = -1.5", "worker.poll_interval = -1.5", "above 0"),
        ("worker", "poll_interval = nan", "worker.poll_interval = nan", A_NUMBER),
        ("worker", "poll_interval = inf", "worker.poll_interval = inf", "at most a year"),
        ("worker", "poll_interval = 1" + 400 * "0", "worker.poll_interval = 1000", "at most a year"),
        ("worker", "poll_interval = []", "worker.poll_interval = []", A_NUMBER),
        ("worker", "poll_interval = { a = 1 }", "worker.poll_interval = a table", A_NUMBER),
        ("worker", "poll_interval = 2024-01-01", "worker.poll_interval = datetime.date(2024, 1, 1)", A_NUMBER),
        ("worker", "heartbeat_interval = 0", "worker.heartbeat_interval = 0", A_NUMBER),
        ("worker", "orphan_reaper_interval = 0", "worker.orphan_reaper_interval = 0", A_NUMBER),
        ("worker", "shutdown_timeout = -1", "worker.shutdown_timeout = -1", "from 0 to a year"),
        ("worker", "kill_grace = 'soon'", "worker.kill_grace = 'soon'", "from 0 to a year"),
        ("worker", "prefetch = 0", "worker.prefetch = 0", "a whole number from 1"),
        ("worker", "prefetch = 1.0", "worker.prefetch = 1.0", "a whole number from 1"),
        ("worker", "error_cap = 0", "worker.error_cap = 0", "a whole number from 1 to 1000"),
        ("worker", "max_crashes = 0", "worker.max_crashes = 0", "a whole number from 1 to 1000"),
        ("worker", "max_result_bytes = '1X'", "worker.max_result_bytes = '1X'", '"512M"'),
        ("worker", "max_result_bytes = '-1K'", "worker.max_result_bytes = '-1K'", '"512M"'),
        ("worker", "name = ''", "worker.name = ''", "1 to 128 characters"),
        ("worker", f"name = '{129 * 'x'}'", "worker.name = 'xxx", "1 to 128 characters"),
        ("worker", 'name = "a\\u0000"', r"worker.name = 'a\x00'", "without NUL"),
        ("worker", "retry_strategy = 'sometimes'", "retry_strategy.strategy = 'sometimes'", '"exponential", "linear"'),
        ("worker", "retry_strategy = 3", "worker.retry_strategy = 3", "or a table"),
        ("worker", "retry_strategy = { base = 0 }", "worker.retry_strategy.base = 0", "from 1 to 1000"),
        ("worker", "retry_strategy = { jitter = 1 }", "worker.retry_strategy.jitter = 1", "true or false"),
        ("worker", "retry_strategy = { step = 1 }", "worker.retry_strategy.step", "takes only base, jitter, cap"),
        (
            "worker",
            "retry_strategy = { strategy = 'fixed', cap = 1 }",
            "worker.retry_strategy.cap",
            "fixed takes only delay",
        ),
        ("worker", "run_cron = 1", "worker.run_cron = 1", "true or false"),
        ("cron", "x = 1", "cron.x = 1", "a table, [cron.x]"),
        ("cron", "'' = {}", "cron.''", "a name of 1 to 128 characters"),
        ("cron.x", "task = ''", "cron.x.task = ''", "1 to 128 characters"),
        ("cron.x", "queue = 1", "cron.x.queue = 1", "1 to 128 characters"),
        ("cron.x", "expression = 5", "cron.x.expression = 5", "a string of five fields"),
        ("cron.x", "expression = '* * * *'", "cron.x.expression = '* * * *'", "it has 4 fields; exactly five"),
        ("cron.x", "expression = '61 * * * *'", "cron.x.expression", "expected are numbers from 0 to 59"),
        ("cron.x", "expression = '0 0 30 2 *'", "cron.x.expression", "it never fires"),
        ("cron.x", f"expression = '{'*/1,' * 300_000}'", "cron.x.expression", "has 1200000 characters"),
        ("cron.x", "timezone = 'Europe/Berlim'", "cron.x.timezone", "did you mean Europe/Berlin?"),
        ("cron.x", "args = '{}'", "cron.x.args = '{}'", "expected a table"),
        ("cron.x", "args = { a = 2026-01-01 }", "cron.x.args.a", "is a date, which JSON cannot hold"),
        ("cron.x", "args = { a = [ nan ] }", "cron.x.args.a[0]", "which JSON cannot hold"),
        ("cron.x", "priority = 3000000000", "cron.x.priority", "a whole number from"),
        ("cron.x", "max_attempts = 0", "cron.x.max_attempts = 0", "a whole number from 1"),
        ("cron.x", "enabled = 'no'", "cron.x.enabled = 'no'", "true or false"),
        ("cron.x", "catch_up = 'all'", "cron.x.catch_up = 'all'", 'one of "none", "latest"'),
        ("database", "startup_max_retries = -1", "database.startup_max_retries = -1", "a whole number from 0"),
        ("database", "startup_retry_delay = 0", "database.startup_retry_delay = 0", A_NUMBER),
        ("database", "listen_reconnect_delay = 0", "database.listen_reconnect_delay = 0", A_NUMBER),
        ("database", "embedded = ''", "database.embedded", "the path of a directory"),
        ("database", "embedded = true", "database.embedded", "the path of a directory"),
        ("handlers", "modules = 'shop.jobs'", "handlers.modules = 'shop.jobs'", "a list of different dotted module"),
        ("handlers", "modules = ['shop/jobs.py']", "handlers.modules = ['shop/jobs.py']", "dotted module names"),
        ("handlers", "modules = ['a', 'a']", "handlers.modules = ['a', 'a']", "different"),
        ("handlers", "modules = [1]", "handlers.modules = [1]", "dotted module names"),
        ("handlers", "modules = [[]]", "handlers.modules = [[]]", "dotted module names"),
        ("handlers", "pythonpath = '/srv'", "handlers.pythonpath = '/srv'", "a list of directories"),
        ("handlers", "pythonpath = ['']", "handlers.pythonpath = ['']", "a list of directories"),
        ("handlers", "import_timeout = 0", "handlers.import_timeout = 0", A_NUMBER),
        ("handlers", "registry = 'shop.jobs'", "handlers.registry = 'shop.jobs'", '"module:attribute"'),
        ("pools.a", "queues = []", "pools.a.queues = []", "one or more different queue names"),
        ("pools.a", "queues = 'a'", "pools.a.queues = 'a'", "a list of one or more"),
        ("pools.a", "queues = ['']", "pools.a.queues = ['']", "1 to 128 characters"),
        ("pools.a", "queues = ['a', 'a']", "pools.a.queues = ['a', 'a']", "different"),
        ("pools.a", f"queues = ['{129 * 'x'}']", "pools.a.queues = ['xxx", "1 to 128 characters"),
        ("pools.a", 'queues = ["\\u0000"]', r"pools.a.queues = ['\x00']", "without NUL"),
        ("pools.default", "concurrency = 0", "pools.default.concurrency = 0", "a whole number from 1 to 1000"),
        ("pools.default", "concurrency = 1001", "pools.default.concurrency = 1001", "from 1 to 1000"),
        ("pools.default", "max_jobs_per_child = 0", "pools.default.max_jobs_per_child = 0", "a whole number from 1"),
        ("pools.default", "max_rss_bytes = 512", "pools.default.max_rss_bytes = 512", "from 1048576"),
        ("pools.default", "max_rss_bytes = 1.5", "pools.default.max_rss_bytes = 1.5", '"512M"'),
        ("pools.default", "memory_limit_bytes = '9T'", "pools.default.memory_limit_bytes = '9T'", "K, M or G"),
        ("pools", "default = 3", "pools.default = 3", "a table, [pools.default]"),
        ("pools", "queues = ['a']", "pools.queues = ['a']", "a table, [pools.queues]"),
        ("pools.'a b'", "queues = ['a']", "pool 'a b'", "letters, digits"),
        ("pools.a", "concurrency = 1", "pools.a", 'it has no queues; write queues = ["a"] under [pools.a]'),
        ("log", "level = 'loud'", "log.level = 'loud'", '"debug", "info", "warning", "error", "critical"'),
        ("log", "level = 10", "log.level = 10", '"debug", "info"'),
        ("log", "format = 'xml'", "log.format = 'xml'", '"auto", "json", "console", "journald"'),
    ],
)
def test_a_wrong_value_is_shown_with_its_file_its_key_and_what_is_expected(
    file: Path, section: str, line: str, shown: str, expected: str
) -> None:
    file.write_text(f"[{section}]\n{line}\n")
    (problem,) = problems(file)
    assert problem.startswith("cannot use ")
    assert shown in problem
    assert f"from {file}" in problem
    assert expected in problem


@pytest.mark.parametrize("section", ["database", "worker", "handlers", "pools", "log"])
@pytest.mark.parametrize("value", ["3", "'x'", "[]", "[{}]"])
def test_a_section_must_be_a_table(file: Path, section: str, value: str) -> None:
    file.write_text(f"{section} = {value}")
    problem = problems(file)[0]
    assert f"cannot use {section} = " in problem
    assert f"expected a table, [{section}" in problem


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("ROOST_WORKER__POLL_INTERVAL", "fast", A_NUMBER),
        ("ROOST_WORKER__POLL_INTERVAL", "", A_NUMBER),
        ("ROOST_WORKER__POLL_INTERVAL", "1\nname = 'x'", A_NUMBER),
        ("ROOST_WORKER__POLL_INTERVAL__X", "1", A_NUMBER),
        ("ROOST_WORKER__NAME", "a\udcff", "1 to 128 characters"),
        ("ROOST_WORKER", "x", None),
        ("ROOST_POOLS__DEFAULT", "x", "a table, [pools.default]"),
        ("ROOST_POOLS__DEFAULT__QUEUES", ",", "one or more"),
        ("ROOST_POOLS__DEFAULT__QUEUES", "[1]", "one or more"),
        ("ROOST_HANDLERS__MODULES", 10_000 * "[", "module names"),
        ("ROOST_WORKER__RETRY_STRATEGY", "5", "or a table"),
        ("ROOST_WORKER__RETRY_STRATEGY__JITTER", "perhaps", "true or false"),
    ],
)
def test_a_wrong_value_of_a_variable_names_the_variable(variable: str, text: str, expected: str | None) -> None:
    environ = {**ENVIRON, variable: text}
    if expected is None:
        load(None, environ=environ, flags={})
        return
    (problem,) = problems(None, environ)
    assert f"from environment {variable}: expected " in problem
    assert expected in problem


def test_a_wrong_value_of_a_flag_names_the_flag() -> None:
    (problem,) = problems(None, flags={"worker.poll_interval": -1})
    assert problem.startswith("cannot use worker.poll_interval = -1 from flag --poll-interval: expected a number")


def test_a_wrong_value_that_a_later_source_replaces_is_no_error(file: Path) -> None:
    file.write_text("[worker]\nname = 3")
    assert load(file, environ={**ENVIRON, "ROOST_WORKER__NAME": "a"}, flags={}).config.worker.name == "a"


def test_a_name_from_the_file_cannot_break_the_message_into_lines(file: Path) -> None:
    file.write_text('[pools."a\\nb"]\nqueue = 1\nconcurrency = 0\n["x\\ny"]\n[log]\n"a\\nb" = "c\\nd"\nlevel = "\\n"')
    found = problems(file)
    assert len(found) == 6
    assert not any("\n" in problem for problem in found)


def test_all_problems_are_told_at_once(file: Path) -> None:
    file.write_text("[worker]\nnam = 1\nprefetch = 0\n[pools.a]\n[log]\nlevel = 1\n[surprise]")
    assert len(problems(file, {})) == 6


def test_a_queue_in_two_pools_names_both_pools_and_where_they_are(file: Path) -> None:
    file.write_text("[pools.a]\nqueues = ['x', 'y']\n[pools.b]\nqueues = ['y']")
    file.with_suffix(".d").mkdir()
    drop_in = file.with_suffix(".d") / "c.toml"
    drop_in.write_text("[pools.c]\nqueues = ['x']")
    assert problems(file) == (
        f"cannot use pools.b.queues from {file}: queue 'y' is also in pools.a.queues from {file}; "
        "leave it in one of them",
        f"cannot use pools.c.queues from {drop_in}: queue 'x' is also in pools.a.queues from {file}; "
        "leave it in one of them",
    )


def test_the_default_queue_of_the_default_pool_counts_too(file: Path) -> None:
    file.write_text("[pools.default]\nconcurrency = 2\n[pools.b]\nqueues = ['default']")
    (problem,) = problems(file)
    assert "queue 'default' is also in pools.default.queues from default" in problem


@pytest.mark.parametrize("stale_after", [10, 30, 29.9])
def test_peers_must_not_bury_a_worker_for_one_late_heartbeat(file: Path, stale_after: float) -> None:
    file.write_text(f"[worker]\norphan_stale_after = {stale_after}")
    (problem,) = problems(file)
    assert f"worker.orphan_stale_after = {float(stale_after)} from {file}" in problem
    assert "more than twice worker.heartbeat_interval = 15.0 from default" in problem
    assert "set it above 30.0" in problem


# The database


def test_no_database_at_all_says_how_to_name_one(file: Path) -> None:
    file.write_text("")
    (problem,) = problems(file, {})
    assert problem == (f"cannot find a database: set dsn or embedded under [database] in {file}, or ROOST_DSN")
    assert "with -c" in problems(None, {})[0]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("dsn = 'dbname=a'", "embedded = '/a'"),
        ("dsn = 'dbname=a'", "dsn_file = '/a'"),
        ("dsn_file = '/a'", "embedded = '/a'"),
        ("dsn = 'dbname=a'\nlisten_dsn = 'dbname=a'", "listen_dsn_file = '/a'"),
    ],
)
def test_one_source_cannot_name_two_databases(file: Path, one: str, two: str) -> None:
    file.write_text(f"[database]\n{one}\n{two}")
    (problem,) = problems(file)
    for part in (
        f"database.{one.splitlines()[-1].split()[0]}",
        f"database.{two.split()[0]}",
        str(file),
        "leave one of them",
    ):
        assert part in problem


def test_an_embedded_database_is_listened_to_as_it_is(file: Path) -> None:
    file.write_text("[database]\nembedded = '/a'\nlisten_dsn = 'dbname=a'")
    (problem,) = problems(file)
    assert problem.startswith(f"cannot use database.listen_dsn from {file}: no pooler stands before an embedded")


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        "   ",
        "hunter2",
        "host=db password=hunter2 oops",
        "mysql://app:hunter2@db/shop",
        "postgresql+psycopg://app:hunter2@db/shop",
        "postgresql://app:hunter2/x@db/shop",
        "postgresql://app:x@hunter2@db/shop",
        "postgresql://app:hunter2%@db/shop",
        "postgresql://db/shop?pasword=hunter2",
        "postgresql://app:hunter2",
        "dbname=app\0",
    ],
)
@pytest.mark.parametrize("place", ["file", "listen_dsn", "variable", "ROOST_DSN", "dsn_file", "wrong key"])
def test_a_dsn_that_libpq_would_misread_is_refused_without_being_shown(file: Path, dsn: str, place: str) -> None:
    escaped = dsn.replace("\0", "\\u0000")
    environ = {}
    match place:
        case "file":
            file.write_text(f'[database]\ndsn = "{escaped}"')
            where = "database.dsn from " + str(file)
        case "listen_dsn":
            file.write_text(f'[database]\ndsn = "dbname=app"\nlisten_dsn = "{escaped}"')
            where = "database.listen_dsn from " + str(file)
        case "variable":
            file.write_text("")
            environ["ROOST_DATABASE__DSN"] = dsn
            where = "database.dsn from environment ROOST_DATABASE__DSN"
        case "ROOST_DSN":
            file.write_text("")
            environ["ROOST_DSN"] = dsn
            where = "database.dsn from environment ROOST_DSN" if dsn else "cannot find a database"
        case "dsn_file":
            secret = file.parent / "dsn"
            secret.write_text(dsn)
            file.write_text("[database]\ndsn_file = 'dsn'")
            where = f"database.dsn_file {secret} from {file}"
        case _:
            file.write_text(f'[database]\nembedded = "{escaped}"\n')
            if "://" not in dsn and "password" not in dsn and dsn != "" and "\0" not in dsn:
                return  # may well be a path
            where = f"database.embedded from {file}"
    (problem,) = problems(file, environ)
    assert where in problem
    assert "expected" in problem or "cannot find" in problem
    assert "hunter2" not in problem


def test_a_dsn_of_another_type_is_not_shown_either(file: Path) -> None:
    file.write_text("[database]\ndsn = ['hunter2']")
    (problem,) = problems(file)
    assert "hunter2" not in problem


# Files


def test_a_missing_file_is_named(file: Path) -> None:
    assert problems(file) == (f"cannot read {file}: no such file; create it, or name another one with -c",)


@pytest.mark.parametrize("name", [None, ".", "/"])
def test_a_directory_in_place_of_a_file_is_named(tmp_path: Path, name: str | None) -> None:
    path = Path(name) if name else tmp_path
    (problem,) = problems(path)
    assert problem.startswith(f"cannot read {path}: it is a directory; name a file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[worker]\nname = \n", "at line 2, column 8"),
        (b"[worker\n", "at line 1, column 8"),
        (b"[worker]\n[worker]\n", "at line 2, column 8"),
        (b"a = 1\na = 2\n", "at line 2, column 6"),
        (b"[worker]\nname = '\xff'\n", "byte 17 is not UTF-8; save it as UTF-8"),
        (b"a = " + 100_000 * b"[", "recursion"),
    ],
)
def test_a_file_that_is_no_toml_is_named_with_the_line(file: Path, content: bytes, reason: str) -> None:
    file.write_bytes(content)
    (problem,) = problems(file)
    assert str(file) in problem
    assert reason in problem


def test_a_broken_drop_in_is_named_and_so_is_every_other(file: Path) -> None:
    drop_ins = file.with_suffix(".d")
    (drop_ins / "30.toml").mkdir(parents=True)
    (drop_ins / "10.toml").write_text("=")
    (drop_ins / "20.toml").symlink_to("nowhere")
    file.write_text("=")
    assert [problem.split(":")[0] for problem in problems(file)] == [
        f"cannot parse {file}",
        f"cannot parse {drop_ins / '10.toml'}",
        f"cannot read {drop_ins / '20.toml'}",
        f"cannot read {drop_ins / '30.toml'}",
    ]


def test_a_file_in_place_of_the_folder_of_drop_ins_is_named(file: Path) -> None:
    file.write_text("")
    file.with_suffix(".d").write_text("")
    (problem,) = problems(file)
    assert problem.startswith(f"cannot read drop-ins in {file.with_suffix('.d')}: Not a directory")


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Root may read everything, so be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.usefixtures("unprivileged")
def test_files_that_may_not_be_read_are_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "roost.toml"
        secret = Path(folder) / "dsn"
        file.write_text("[database]\ndsn_file = 'dsn'")
        secret.write_text("dbname=app")
        secret.chmod(0)
        (problem,) = problems(file)
        assert problem.startswith(f"cannot read database.dsn_file {secret} from {file}: Permission denied; let ")
        file.chmod(0)
        (problem,) = problems(file)
        assert problem.startswith(f"cannot read {file}: Permission denied; let the user who runs this read it")


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere", "no such file"), (".", "Is a directory"), ("loop", "Too many levels")]
)
def test_a_dsn_file_that_cannot_be_read_is_named(file: Path, name: str, reason: str) -> None:
    (file.parent / "loop").symlink_to("loop")
    file.write_text(f"[database]\ndsn_file = '{name}'")
    (problem,) = problems(file)
    assert problem.startswith(f"cannot read database.dsn_file {file.parent / name} from {file}: {reason}")


def test_a_dsn_file_that_is_not_text_is_named(file: Path) -> None:
    (file.parent / "dsn").write_bytes(b"\xff\xfe")
    file.write_text("[database]\ndsn_file = 'dsn'")
    (problem,) = problems(file)
    assert f"cannot use database.dsn_file {file.parent / 'dsn'}" in problem
