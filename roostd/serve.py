"""Reads the settings, starts the embedded database where asked to, and runs a master: what `roostd` does."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import psycopg
import structlog

from roost_client import SchemaError
from roost_client.schema import apply_migrations
from roostd import log
from roostd.config import Config, ConfigError, LoadedConfig, describe, load
from roostd.config import as_json as settings_as_json
from roostd.core.timetable import Entry
from roostd.embedded import EmbeddedError, EmbeddedPostgres
from roostd.master.run import EXIT_CONFIG, EXIT_UNAVAILABLE, HandlersError, Master, StartError
from roostd.master.templates import TemplateProcess

_log = structlog.get_logger()


def main(path: Path | None, flags: dict[str, Any], *, check: bool, as_json: bool, once: bool) -> None:
    """Runs the daemon with the settings of `path` and `flags` (by dotted key); ends the process where it can't."""

    def read() -> LoadedConfig:
        return load(path, environ=os.environ, flags=flags)

    try:
        loaded = read()
    except ConfigError as error:
        _fail(f"roostd: {error}", EXIT_CONFIG)
    log.configure(loaded.config.log.level, loaded.config.log.format)
    if check:
        sys.exit(_check(loaded, as_json))
    for warning in loaded.warnings:
        _log.warning("config.warning", warning=warning)
    try:
        jobs = serve(loaded.config, lambda: read().config, once=once)
    except HandlersError as error:
        _fail(f"roostd: {_with_fix(str(error), loaded)}", error.exit_code)
    except StartError as error:
        _fail(f"roostd: {error}", error.exit_code)
    except EmbeddedError as error:
        _fail(f"roostd: {error}", EXIT_UNAVAILABLE)
    if once:
        click.echo(jobs)


def serve(config: Config, reload_config: Callable[[], Config], *, once: bool = False) -> int:
    """Runs a master until it is stopped, with its embedded database where one is set; returns how many jobs ended.

    Raises StartError and EmbeddedError.
    """
    directory = config.database.embedded
    if directory is None:
        return asyncio.run(Master(config, reload_config=reload_config).run(once=once))
    with EmbeddedPostgres(directory) as postgres:
        _migrate(postgres.dsn)

        def with_dsn(config: Config) -> Config:
            database = dataclasses.replace(config.database, dsn=postgres.dsn)
            return dataclasses.replace(config, database=database)

        keep = [postgres.pid] if postgres.pid else []
        master = Master(with_dsn(config), reload_config=lambda: with_dsn(reload_config()), keep=keep)
        return asyncio.run(master.run(once=once))


def _migrate(dsn: str) -> None:
    try:
        with psycopg.connect(dsn) as conn:
            apply_migrations(conn)
    except SchemaError as error:
        raise StartError(str(error), EXIT_CONFIG) from error


def _check(loaded: LoadedConfig, as_json: bool) -> int:
    """Prints the settings and the tasks that the handler modules register; returns the exit code."""
    if not as_json:
        click.echo(describe(loaded))
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    report = _import_handlers(loaded.config, as_json)
    for warning in report.get("warnings", []):
        click.echo(f"warning: {warning}", err=True)
    if report["op"] != "ready":
        if trace := report.get("trace"):
            click.echo(trace, err=True)
        error = _with_fix(report["error"], loaded) if report.get("handlers", True) else report["error"]
        click.echo(f"roostd: {error}", err=True)
        return EXIT_CONFIG
    if as_json:
        found = {"settings": settings_as_json(loaded), "tasks": report["described"], "cron": report["cron"]}
        click.echo(json.dumps(found, default=str))
        return 0
    click.echo(f"# tasks: {', '.join(report['tasks']) or 'none'}")
    for entry in map(Entry.from_json, report["cron"]):
        state = "" if entry.enabled else ", not enabled"
        click.echo(f"# cron: {entry.name}: {entry.expression} {entry.timezone}, task {entry.task}{state}")
    return 0


def _with_fix(error: str, loaded: LoadedConfig) -> str:
    """What is wrong with the handlers, and where to look: in their code, or in the settings that lead to it."""
    key = "worker.hooks" if "NoHooks: " in error else "handlers.modules"
    return f"{error}; correct the code, or {key} from {loaded.origins[key]} and handlers.pythonpath"


def _import_handlers(config: Config, describe: bool) -> dict[str, Any]:
    """What a template process says of the handlers: as a reload would find them, in a process of their own."""
    reports: list[dict[str, Any]] = []
    template = TemplateProcess(1, config, describe=describe)
    try:
        poll = select.poll()
        poll.register(template.fileno(), select.POLLIN)
        if not poll.poll(config.handlers.import_timeout * 1000):
            seconds = config.handlers.import_timeout
            return {"op": "failed", "error": f"importing the handlers took more than import_timeout ({seconds:g} s)"}
        template.read(lambda _template, message, _fds: reports.append(message))
        if reports[0]["op"] == "gone":
            how = template.describe_exit()
            return {"op": "failed", "error": f"the process that imports the handlers {how}"}
        return reports[0]
    finally:
        template.close()


def _fail(message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)
