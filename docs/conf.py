"""Sphinx's settings, and the parts of reference/ that are made from the code when the site is built.

A page says `<!-- made: settings -->` where such a part belongs; the functions in MADE write it, as Markdown. Nothing is
fetched from anywhere.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from pygments.lexers import PostgresLexer
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import roost_client
import roostd
from roost_client import errors
from roost_client.schema import migrations
from roostd import cli, ctl
from roostd.config.kinds import KINDS
from roostd.config.settings import Config, CronConfig, PoolConfig, RetryPolicy

ROOT = Path(__file__).parents[1]

project = "Roost"
release = version = roostd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Roost {release}"
html_copy_source = False
myst_heading_anchors = 4

smartquotes = False
default_role = "literal"  # docstrings have `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# What is not ours, not public, or a type variable has no page here.
nitpick_ignore_regex = [("py:.*", r"(?!roost).*|roost_client\.(aclient|backoff|current)\..*|.*\.[A-Z]")]


def settings() -> Iterator[str]:
    """Every key: its value from `kinds`, its default from `settings`, what it is for from etc/roost.toml."""
    config = Config()
    tables: dict[str, Any] = {name: getattr(config, name) for name in ("database", "worker", "handlers", "log")}
    tables["worker.retry_strategy"] = RetryPolicy()
    tables["pools.NAME"] = PoolConfig(name="", queues=())
    tables["cron.NAME"] = CronConfig(name="")
    purposes = dict(_purposes())
    for section in KINDS:
        yield f"## `[{section}]`\n"
        yield "| key | value | default | |\n|---|---|---|---|"
        for key, kind in KINDS[section].items():
            where = {"pools.NAME": "pools.default", "cron.NAME": "cron.nightly"}.get(section, section)
            purpose = purposes.get((where, key), "")
            yield f"| `{key}` | {_cell(kind.expected)} | {_default(tables[section], key)} | {_cell(purpose)} |"
        yield ""


def _purposes() -> Iterator[tuple[tuple[str, str], str]]:
    """The comment above each key of etc/roost.toml."""
    section, comment = "", ""
    for line in (ROOT / "etc" / "roost.toml").read_text().splitlines():
        if header := re.fullmatch(r"#?\[([\w.]+)\]", line):
            section = header[1]
        elif key := re.match(r"#?([a-z_]+) = ", line):
            yield (section, key[1]), comment.strip()
        elif line.startswith("# "):
            comment += line.removeprefix("#")
            continue
        comment = ""


def _default(table: Any, key: str) -> str:
    value = getattr(table, key)
    if key == "name" or value is None or value == ():
        return ""
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("<", r"\<")


def commands(name: str) -> Iterator[str]:
    """The help of a command and of those below it."""
    command = {"roostd": cli.main, "roostctl": ctl.roostctl}[name]
    yield from _command(click.Context(command, info_name=name, max_content_width=100, terminal_width=100))


def _command(context: click.Context) -> Iterator[str]:
    command = context.command
    if context.parent is not None:
        yield f"### `{context.command_path}`\n"
    yield f"```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _command(
                click.Context(below, info_name=name, parent=context, max_content_width=100, terminal_width=100)
            )


def codes() -> Iterator[str]:
    """The exceptions with their codes."""
    yield "| exception | code | is a | |\n|---|---|---|---|"
    for name, each in vars(errors).items():
        if inspect.isclass(each) and each.__module__ == errors.__name__:
            bases = ", ".join(f"`{base.__name__}`" for base in each.__bases__)
            first = (inspect.getdoc(each) or "").partition("\n")[0]
            yield f"| [`{name}`](#roost_client.{name}) | `{each.__dict__['code']}` | {bases} | {first} |"


def job_fields() -> Iterator[str]:
    """The fields of Job, with their types as they are written."""
    yield "| field | type |\n|---|---|"
    for name, annotation in inspect.get_annotations(roost_client.Job).items():
        if name in roost_client.Job.model_fields:
            kind = re.sub(r"Annotated\[(\w+),.*", r"\1", annotation)
            yield f"| `{name}` | {_cell(f'`{kind}`')} |"


def sql(name: str) -> Iterator[str]:
    """A function as the last migration defines it, with the comment above it."""
    text = "".join(migration.sql for migration in migrations())
    definition = rf"((?:^--.*\n)+)^CREATE (?:OR REPLACE )?FUNCTION (roost\.{name}\([^)]*\)) (RETURNS \w+)"
    comment, function, returns = re.findall(definition, text, re.MULTILINE)[-1]
    yield f"```sql\n{function}\n{returns}\n```\n"
    yield " ".join(line.removeprefix("-- ") for line in comment.splitlines()) + "\n"


MADE: dict[str, Callable[..., Iterator[str]]] = {
    "settings": settings,
    "commands": commands,
    "codes": codes,
    "job_fields": job_fields,
    "sql": sql,
}


def _make(_app: Sphinx, _page: str, source: list[str]) -> None:
    def made(marker: re.Match[str]) -> str:
        what, *arguments = marker[1].split()
        return "\n".join(MADE[what](*arguments))

    source[0] = re.sub(r"^<!-- made: (.*) -->$", made, source[0], flags=re.MULTILINE)


def _find(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> Any:
    """What a signature names by the module that defines it stands on the page under its public name."""
    target = node.get("reftarget", "")
    public = f"roost_client.{target.rpartition('.')[2]}"
    if not target.startswith("roost_client.") or public == target:
        return None
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)


def setup(app: Sphinx) -> None:
    app.add_lexer("sql", PostgresLexer)
    app.connect("source-read", _make)
    app.connect("missing-reference", _find)
