"""Which source a setting comes from, and how sources add up."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import roost_client
from roostd.config import Config, DatabaseConfig, LoadedConfig, PoolConfig, RetryPolicy, describe, load

DSN = "postgresql:///app"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "roost.toml"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def load_file(file: Path, text: str = "", **environ: str) -> LoadedConfig:
    return load(write(file, text), environ={"ROOST_DSN": DSN, **environ}, flags={})


def test_without_any_setting_the_defaults_hold(file: Path) -> None:
    loaded = load_file(file)
    assert loaded.config == Config(database=DatabaseConfig(dsn=DSN))
    assert loaded.config.pools == (PoolConfig(name="default", queues=("default",), concurrency=4),)
    assert loaded.config.worker.name == socket.gethostname()
    assert loaded.warnings == ()
    given = {key: origin for key, origin in loaded.origins.items() if origin != "default"}
    assert given == {"database.dsn": "environment ROOST_DSN"}


def test_no_file_is_needed() -> None:
    assert load(None, environ={}, flags={"database.dsn": DSN}).config.database.dsn == DSN


def test_every_key_can_be_given_in_the_file(file: Path) -> None:
    loaded = load_file(
        file,
        """
        [database]
        dsn = "postgresql://db/shop"
        startup_max_retries = 0
        startup_retry_delay = 2
        listen_reconnect_delay = 0.25
        [worker]
        name = "büro-1"
        poll_interval = 0.1
        prefetch = 64
        heartbeat_interval = 1
        orphan_reaper_interval = 3
        orphan_stale_after = 2.1
        shutdown_timeout = 0
        kill_grace = 0.0
        error_cap = 1
        max_crashes = 7
        max_result_bytes = "2M"
        retry_strategy = { strategy = "fixed", delay = 5 }
        [handlers]
        modules = ["shop.jobs", "mail"]
        pythonpath = ["/srv/shop", "lib"]
        import_timeout = 5
        registry = "shop.jobs:registries.main"
        [pools.mail_1]
        queues = ["emails", "a.b", "'; DROP TABLE jobs; --", "Ünïcode "]
        concurrency = 1000
        max_jobs_per_child = 10
        max_rss_bytes = "300m"
        memory_limit_bytes = 1073741824
        [pools.cpu-2]
        queues = ["default"]
        [log]
        level = "debug"
        format = "json"
        """,
    )
    config = loaded.config
    assert config.database == DatabaseConfig(
        dsn="postgresql://db/shop", startup_max_retries=0, startup_retry_delay=2.0, listen_reconnect_delay=0.25
    )
    assert (config.worker.name, config.worker.prefetch, config.worker.max_result_bytes) == ("büro-1", 64, 2 << 20)
    assert config.worker.retry_strategy == RetryPolicy(strategy="fixed", delay=5.0)
    assert config.handlers.pythonpath == (Path("/srv/shop"), file.parent / "lib")
    assert config.handlers.registry == "shop.jobs:registries.main"
    assert [pool.name for pool in config.pools] == ["mail_1", "cpu-2"]
    assert config.pools[0].queues == ("emails", "a.b", "'; DROP TABLE jobs; --", "Ünïcode ")
    assert (config.pools[0].max_rss_bytes, config.pools[0].memory_limit_bytes) == (300 << 20, 1 << 30)
    assert config.log.level == "debug"
    # Whole numbers are fine where a float is meant, and become one.
    assert isinstance(config.worker.heartbeat_interval, float)
    assert loaded.origins["pools.mail_1.max_rss_bytes"] == str(file)
    assert loaded.origins["worker.retry_strategy.delay"] == str(file)


def test_later_sources_win_and_each_value_says_where_it_is_from(file: Path) -> None:
    write(
        file,
        """
        [worker]
        name = "file"
        error_cap = 1
        max_crashes = 1
        kill_grace = 1
        [handlers]
        modules = ["a", "b"]
        [pools.default]
        queues = ["default"]
        concurrency = 1
        [pools.mail]
        queues = ["mail"]
        """,
    )
    drop_ins = file.with_suffix(".d")
    write(drop_ins / "20-late.toml", "[worker]\nmax_crashes = 3\nkill_grace = 3\n[handlers]\nmodules = ['c']")
    write(
        drop_ins / "10-early.toml",
        "[worker]\nerror_cap = 2\nmax_crashes = 2\nkill_grace = 2\n[pools.mail]\nconcurrency = 2",
    )
    write(drop_ins / ".hidden.toml", "nonsense")
    write(drop_ins / "30-other.toml.bak", "nonsense")
    loaded = load(
        file,
        environ={"ROOST_WORKER__KILL_GRACE": "4", "ROOST_POOLS__MAIL__QUEUES": "post, pigeon"},
        flags={"database.embedded": "/var/lib/roost", "log.level": "error", "worker.prefetch": None},
    )
    worker = loaded.config.worker
    assert (worker.name, worker.error_cap, worker.max_crashes, worker.kill_grace) == ("file", 2, 3, 4.0)
    assert loaded.config.handlers.modules == ("c",)
    assert loaded.config.pools == (
        PoolConfig(name="default", queues=("default",), concurrency=1),
        PoolConfig(name="mail", queues=("post", "pigeon"), concurrency=2),
    )
    expected = {
        "worker.name": str(file),
        "worker.error_cap": str(drop_ins / "10-early.toml"),
        "worker.max_crashes": str(drop_ins / "20-late.toml"),
        "worker.kill_grace": "environment ROOST_WORKER__KILL_GRACE",
        "worker.prefetch": "default",
        "handlers.modules": str(drop_ins / "20-late.toml"),
        "pools.mail.concurrency": str(drop_ins / "10-early.toml"),
        "pools.mail.queues": "environment ROOST_POOLS__MAIL__QUEUES",
        "database.embedded": "flag --embedded",
        "log.level": "flag --log-level",
    }
    assert {key: loaded.origins[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("WORKER__NAME", "0123", lambda c: c.worker.name == "0123"),
        ("WORKER__POLL_INTERVAL", "0.5", lambda c: c.worker.poll_interval == 0.5),
        ("WORKER__POLL_INTERVAL", "1e2", lambda c: c.worker.poll_interval == 100.0),
        ("WORKER__PREFETCH", "8", lambda c: c.worker.prefetch == 8),
        ("WORKER__MAX_RESULT_BYTES", "4K", lambda c: c.worker.max_result_bytes == 4096),
        ("WORKER__RETRY_STRATEGY", "linear", lambda c: c.worker.retry_strategy == RetryPolicy(strategy="linear")),
        (
            "WORKER__RETRY_STRATEGY",
            '{strategy = "linear", step = 3}',
            lambda c: c.worker.retry_strategy == RetryPolicy(strategy="linear", step=3.0),
        ),
        (
            "WORKER__RETRY_STRATEGY",
            '{"strategy": "fixed", "delay": 0}',
            lambda c: c.worker.retry_strategy == RetryPolicy(strategy="fixed", delay=0.0),
        ),
        ("WORKER__RETRY_STRATEGY__JITTER", "false", lambda c: not c.worker.retry_strategy.jitter),
        ("HANDLERS__MODULES", "a.b,c", lambda c: c.handlers.modules == ("a.b", "c")),
        ("HANDLERS__MODULES", "", lambda c: c.handlers.modules == ()),
        ("HANDLERS__MODULES", "[\"a\", 'b']", lambda c: c.handlers.modules == ("a", "b")),
        ("HANDLERS__PYTHONPATH", "lib", lambda c: c.handlers.pythonpath == (Path.cwd() / "lib",)),
        ("POOLS__DEFAULT__CONCURRENCY", "8", lambda c: c.pools[0].concurrency == 8),
        ("POOLS__DEFAULT__QUEUES", '["with,comma"]', lambda c: c.pools[0].queues == ("with,comma",)),
        ("POOLS__A__B__QUEUES", "x", lambda c: c.pools[0].name == "a__b"),
        ("LOG__LEVEL", "warning", lambda c: c.log.level == "warning"),
    ],
)
def test_a_variable_holds_a_value_of_the_keys_kind(variable: str, text: str, expected) -> None:
    config = load(None, environ={"ROOST_DSN": DSN, f"ROOST_{variable}": text}, flags={}).config
    assert expected(config), config


def test_variables_that_are_no_settings_are_left_alone() -> None:
    environ = {"ROOST_DSN": DSN, "ROOST_TEST": "x", "ROOST_": "x", "ROOSTER__X": "x", "PATH__X": "x", "__": ""}
    assert load(None, environ=environ, flags={}).config.database.dsn == DSN


def test_a_variable_finds_its_pool_whatever_the_case_and_hyphens_of_the_name(file: Path) -> None:
    loaded = load_file(file, '[pools.Big-Files]\nqueues = ["big"]', ROOST_POOLS__BIG_FILES__CONCURRENCY="2")
    assert loaded.config.pools == (PoolConfig(name="Big-Files", queues=("big",), concurrency=2),)


def test_cron_entries_keep_only_the_keys_that_are_given(file: Path) -> None:
    text = """
    [cron.nightly]
    enabled = false
    [cron."shop.jobs.clean-up"]
    task = "clean"
    expression = "0 3 * * mon"
    timezone = "Europe/Berlin"
    args = { days = 3, deep = { list = [1, { a = 1.5 }] } }
    queue = "q"
    priority = -1
    max_attempts = 2
    enabled = true
    catch_up = "latest"
    """
    write(file.parent / "roost.d" / "more.toml", '[cron.nightly]\nexpression = "@daily"')
    loaded = load_file(
        file,
        text,
        ROOST_CRON__SHOP_JOBS_CLEAN_UP__ARGS='{"days": 4}',
        ROOST_CRON__NEW__TASK="x",
        ROOST_WORKER__RUN_CRON="false",
    )
    nightly, clean_up, new = loaded.config.cron
    assert (nightly.name, nightly.given()) == ("nightly", {"enabled": False, "expression": "@daily"})
    assert (new.name, new.given()) == ("new", {"task": "x"})
    assert clean_up.name == "shop.jobs.clean-up"
    assert clean_up.given() == {
        "task": "clean", "expression": "0 3 * * mon", "timezone": "Europe/Berlin", "args": {"days": 4}, "queue": "q",
        "priority": -1, "max_attempts": 2, "enabled": True, "catch_up": "latest",
    }  # fmt: skip
    assert loaded.origins["cron.nightly.expression"].endswith("more.toml")
    assert loaded.config.worker.run_cron is False
    lines = [line for line in describe(loaded).splitlines() if line.startswith("cron.nightly")]
    assert lines == [
        f'cron.nightly.expression = "@daily"   # {file.parent / "roost.d" / "more.toml"}',
        f"cron.nightly.enabled = false   # {file}",
    ]


def test_a_named_strategy_replaces_the_one_before_with_all_it_took(file: Path) -> None:
    write(file, '[worker]\nretry_strategy = { strategy = "exponential", base = 3, jitter = false }')
    write(file.with_suffix(".d") / "a.toml", '[worker]\nretry_strategy = { strategy = "linear", step = 2 }')
    assert load(file, environ={"ROOST_DSN": DSN}, flags={}).config.worker.retry_strategy == RetryPolicy(
        strategy="linear", step=2.0
    )


def test_a_strategy_without_a_name_adds_to_the_one_before(file: Path) -> None:
    loaded = load_file(file, '[worker]\nretry_strategy = "linear"', ROOST_WORKER__RETRY_STRATEGY__STEP="7")
    assert loaded.config.worker.retry_strategy == RetryPolicy(strategy="linear", step=7.0)


@pytest.mark.parametrize("strategy", ["exponential", "linear", "fixed"])
def test_a_retry_policy_makes_the_clients_strategy_with_the_same_defaults(strategy: str) -> None:
    factory = getattr(roost_client, strategy)
    assert factory(**RetryPolicy(strategy=strategy).arguments()) == factory()


# Which database


@pytest.mark.parametrize(
    ("text", "environ", "expected", "origin"),
    [
        ("", {"ROOST_DSN": "dbname=r", "DATABASE_URL": "dbname=u"}, "dbname=r", "environment ROOST_DSN"),
        ("", {"ROOST_DSN": "", "DATABASE_URL": "dbname=u"}, "dbname=u", "environment DATABASE_URL"),
        ("dsn = 'dbname=f'", {"ROOST_DSN": "dbname=r", "DATABASE_URL": "dbname=u"}, "dbname=f", "FILE"),
        ("dsn = 'dbname=f'", {"ROOST_DATABASE__DSN": "dbname=v"}, "dbname=v", "environment ROOST_DATABASE__DSN"),
        ("embedded = 'pg'", {"ROOST_DSN": "dbname=r"}, None, "default"),
    ],
)
def test_the_variables_of_clients_count_only_where_nothing_else_names_a_database(
    file: Path, text: str, environ: dict[str, str], expected: str | None, origin: str
) -> None:
    loaded = load(write(file, f"[database]\n{text}"), environ=environ, flags={})
    assert loaded.config.database.dsn == expected
    assert loaded.origins["database.dsn"] == (str(file) if origin == "FILE" else origin)
    if expected is None:
        assert loaded.config.database.embedded == file.parent / "pg"


@pytest.mark.parametrize("earlier", ["dsn = 'dbname=app'", "dsn_file = 'nothing-there'", "embedded = '/other'"])
def test_a_later_source_takes_back_an_earlier_choice_of_database(file: Path, earlier: str) -> None:
    write(file, f"[database]\n{earlier}\nstartup_max_retries = 3")
    database = load(file, environ={}, flags={"database.embedded": "/pg"}).config.database
    assert database == DatabaseConfig(embedded=Path("/pg"), startup_max_retries=3)


@pytest.mark.parametrize("earlier", ["listen_dsn = 'dbname=app'", "listen_dsn_file = 'nothing-there'"])
@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ({"database.listen_dsn": DSN}, DatabaseConfig(dsn="dbname=app", listen_dsn=DSN)),
        ({"database.dsn": DSN}, DatabaseConfig(dsn=DSN)),  # the other way leads to what it was before
        ({"database.embedded": "/pg"}, DatabaseConfig(embedded=Path("/pg"))),
    ],
)
def test_a_later_source_takes_back_where_to_listen(
    file: Path, earlier: str, later: dict[str, str], expected: DatabaseConfig
) -> None:
    write(file, f"[database]\ndsn = 'dbname=app'\n{earlier}")
    assert load(file, environ={}, flags=later).config.database == expected


def test_the_listen_dsn_may_be_in_a_file_of_its_own_or_a_credential(file: Path, tmp_path: Path) -> None:
    for folder, environ in ((file.parent, {}), (tmp_path / "c", {"CREDENTIALS_DIRECTORY": str(tmp_path / "c")})):
        secret = write(folder / "listen", DSN)
        secret.chmod(0o600)
        loaded = load_file(file, "[database]\ndsn = 'dbname=app'\nlisten_dsn_file = 'listen'", **environ)
        assert loaded.config.database == DatabaseConfig(dsn="dbname=app", listen_dsn=DSN, listen_dsn_file=secret)
        assert loaded.origins["database.listen_dsn"] == str(secret)


@pytest.mark.parametrize("absolute", [True, False])
def test_the_dsn_may_be_in_a_file_of_its_own(file: Path, absolute: bool) -> None:
    secret = write(file.parent / "dsn", f"\n  {DSN}\n")
    secret.chmod(0o600)
    loaded = load_file(file, f"[database]\ndsn_file = '{secret if absolute else secret.name}'")
    assert loaded.config.database == DatabaseConfig(dsn=DSN, dsn_file=secret)
    assert loaded.origins["database.dsn"] == str(secret)
    assert loaded.warnings == ()


def test_a_dsn_file_that_all_may_read_is_only_warned_about(file: Path) -> None:
    secret = write(file.parent / "dsn", DSN)
    secret.chmod(0o644)
    loaded = load_file(file, "[database]\ndsn_file = 'dsn'")
    assert loaded.config.database.dsn == DSN
    (warning,) = loaded.warnings
    assert f"chmod o-r {secret}" in warning


@pytest.mark.parametrize("text", ["", "[database]\ndsn_file = 'dsn'", "[database]\ndsn_file = 'other'"])
def test_the_dsn_may_be_a_systemd_credential(file: Path, tmp_path: Path, text: str) -> None:
    credentials = tmp_path / "credentials"
    for name in ("dsn", "other"):
        write(credentials / name, f"dbname={name}").chmod(0o400)
    # Beside the configuration there is a file of that name too: the credential is meant.
    write(file.parent / "dsn", "dbname=wrong")
    loaded = load_file(file, text, CREDENTIALS_DIRECTORY=str(credentials))
    name = "other" if "other" in text else "dsn"
    assert loaded.config.database == DatabaseConfig(dsn=f"dbname={name}", dsn_file=credentials / name)
    assert loaded.origins["database.dsn"] == str(credentials / name)


def test_credentials_without_a_dsn_leave_the_variables_of_clients(file: Path, tmp_path: Path) -> None:
    assert load_file(file, "", CREDENTIALS_DIRECTORY=str(tmp_path)).config.database.dsn == DSN


def test_paths_start_at_the_configurations_folder_wherever_the_process_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "roost.toml", "[handlers]\npythonpath = ['lib']")
    write(tmp_path / "roost.d" / "a.toml", "[database]\nembedded = 'pg'")
    monkeypatch.chdir(tmp_path)
    config = load(Path("roost.toml"), environ={}, flags={}).config
    assert config.handlers.pythonpath == (tmp_path / "lib",)
    assert config.database.embedded == tmp_path / "pg"


def test_a_missing_folder_of_handlers_is_only_warned_about(file: Path) -> None:
    loaded = load_file(file, f"[handlers]\npythonpath = ['nowhere', '{os.sep}']")
    assert len(loaded.warnings) == 1
    assert str(file.parent / "nowhere") in loaded.warnings[0]


# What others get


def test_the_report_names_every_key_its_value_and_its_origin(file: Path) -> None:
    loaded = load_file(
        file,
        "[pools.a]\nqueues = ['x', 'é']\n[database]\n"
        "dsn = 'postgresql://app:hunter2@db/shop'\nlisten_dsn = 'password=hunter2'",
        ROOST_WORKER__RETRY_STRATEGY="linear",
    )
    lines = describe(loaded).splitlines()
    assert f'pools.a.queues = ["x", "é"]   # {file}' in lines
    assert f'database.dsn = "user=app password=*** dbname=shop host=db"   # {file}' in lines
    assert f'database.listen_dsn = "password=***"   # {file}' in lines
    assert "database.embedded = (not set)   # default" in lines
    assert 'worker.retry_strategy.strategy = "linear"   # environment ROOST_WORKER__RETRY_STRATEGY' in lines
    assert "worker.retry_strategy.step = 10.0   # default" in lines
    assert not any("retry_strategy.base" in line for line in lines)
    assert [line.split(" = ")[0] for line in lines] == list(loaded.origins)
    assert "hunter2" not in describe(loaded)


def test_no_representation_of_the_settings_holds_the_dsn(file: Path) -> None:
    text = "[database]\ndsn = 'postgresql://app:hunter2@db/shop'\nlisten_dsn = 'password=hunter2'"
    loaded = load_file(file, text)
    assert "hunter2" not in repr(loaded)
    assert "hunter2" not in str(loaded.config)
