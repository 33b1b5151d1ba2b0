"""etc/roost.toml shows every key with its true default; systemd/roostd.service fits the daemon."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from roostd.config import Config, CronConfig, PoolConfig, RetryPolicy, load
from roostd.config.kinds import KINDS

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "etc" / "roost.toml"
UNIT = ROOT / "systemd" / "roostd.service"
ENVIRON = {"ROOST_DSN": "postgresql:///app"}


def sections() -> dict[str, list[tuple[str, str]]]:
    """Every `key = value` line of the file by section, commented or not."""
    found: dict[str, list[tuple[str, str]]] = {}
    section = ""
    for line in SHIPPED.read_text().splitlines():
        if header := re.fullmatch(r"#?\[([\w.]+)\]", line):
            section = header[1]
            found[section] = []
        elif setting := re.fullmatch(r"#?([a-z_]+) = (.+)", line):
            found[section].append((setting[1], setting[2]))
    return found


def defaults() -> dict[str, Any]:
    config = Config()
    tables = {name: getattr(config, name) for name in ("database", "worker", "handlers", "log")}
    tables["pools.default"] = PoolConfig(name="default", queues=("default",))
    tables["cron.nightly"] = CronConfig(name="nightly")
    return tables


def test_the_shipped_file_changes_nothing() -> None:
    loaded = load(SHIPPED, environ=ENVIRON, flags={})
    assert loaded.config == load(None, environ=ENVIRON, flags={}).config


def test_the_shipped_file_has_every_key_and_no_other() -> None:
    for section, table in defaults().items():
        keys = {entry.name for entry in dataclasses.fields(table)}
        if section.startswith(("pools", "cron")):
            keys.remove("name")
        assert {key for key, _ in sections()[section]} == keys
    assert sections().keys() == defaults().keys()


@pytest.mark.parametrize("section", defaults())
def test_a_key_with_a_default_shows_it_and_one_without_shows_a_valid_example(section: str, tmp_path: Path) -> None:
    table = defaults()[section]
    for key, text in sections()[section]:
        default = getattr(table, key)
        value = tomllib.loads(f"v = {text}")["v"]
        if key == "retry_strategy":
            given = {"strategy": value} if isinstance(value, str) else value
            assert RetryPolicy(**given) == RetryPolicy(strategy=given["strategy"])
        elif default is not None and key != "name":
            assert value == (list(default) if isinstance(default, tuple) else default)
        file = tmp_path / "roost.toml"
        file.write_text(f"[{section}]\n{key} = {text}\n")
        if not key.endswith("dsn_file"):
            load(file, environ=ENVIRON, flags={})


def test_each_key_is_explained_right_above_it() -> None:
    lines = SHIPPED.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"#?[a-z_]+ = ", line):
            assert before.startswith("# "), line


def test_every_key_of_the_settings_has_a_kind_and_the_other_way_round() -> None:
    tables = {**defaults(), "worker.retry_strategy": RetryPolicy()}
    tables["pools.NAME"] = tables.pop("pools.default")
    tables["cron.NAME"] = tables.pop("cron.nightly")
    for section, table in tables.items():
        keys = {entry.name for entry in dataclasses.fields(table)} - {"retry_strategy"}
        if section in ("pools.NAME", "cron.NAME"):
            keys.remove("name")
        assert KINDS[section].keys() == keys
    assert KINDS.keys() == tables.keys()


def unit() -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            settings.setdefault(key, []).append(value)
    return settings


def test_the_unit_leaves_the_daemon_the_time_that_its_defaults_take() -> None:
    config, settings = Config(), unit()
    worker, database = config.worker, config.database
    assert int(settings["TimeoutStopSec"][0]) > worker.shutdown_timeout + worker.kill_grace
    starting = database.startup_max_retries * database.startup_retry_delay + config.handlers.import_timeout
    assert int(settings["TimeoutStartSec"][0]) > starting


def test_the_unit_does_what_the_daemon_counts_on() -> None:
    settings = unit()
    expected = {
        "Type": "notify",
        "KillMode": "mixed",
        "Delegate": "yes",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "78",
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "OOMPolicy": "continue",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
    }
    assert {key: settings[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert int(settings["WatchdogSec"][0]) > 0
    for breaks in ("MemoryDenyWriteExecute", "ProtectControlGroups", "PrivateNetwork", "PrivateUsers", "RemoveIPC"):
        assert breaks not in settings


def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "roostd.service"
    # The program need not be installed here.
    copy.write_text(re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", UNIT.read_text()))
    result = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60)
    complaints = [line for line in result.stderr.splitlines() if copy.name in line and "DelegateSubgroup" not in line]
    assert (result.returncode, complaints) == (0, [])
