"""Every snippet of README.md, run in the order in which it stands there, on a database of the test's own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from roost_client import Roost
from tests.system.daemon import eventually

pytestmark = pytest.mark.daemon

README = Path(__file__).parents[2] / "README.md"
DSN = "postgresql:///app"


class Block(NamedTuple):
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name that its first line gives it."""
        named = re.match(r"# (\S+\.(py|toml))\n", self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command and the output that is shown for it."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        return [(command, shown) for command, _, shown in (part.partition("\n") for part in parts)]


def blocks(text: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


class Reader:
    """Somebody who does what the README says, in a folder of their own."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        self.dsn = dsn
        self.environ = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
            "ROOST_DSN": dsn,
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def write(self, block: Block) -> None:
        assert block.file is not None, f"this block has no name:\n{block.text}"
        path = self.folder / block.file
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text.replace(DSN, self.dsn))

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command.replace(DSN, f"'{self.dsn}'")],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def reader(tmp_path: Path, empty_dsn: str) -> Reader:
    with psycopg.connect(empty_dsn) as conn:
        conn.execute("CREATE TABLE orders (id serial PRIMARY KEY, item text NOT NULL)")
    return Reader(tmp_path, empty_dsn)


def timeless(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "(time)", text)


def test_what_the_readme_shows_works_as_it_shows(reader: Reader) -> None:
    found = blocks(README.read_text())
    operating = next(block for block in found if "roostctl reload" in block.text)
    seen = 0
    for block in found:
        if block.file in ("shop/views.py", "shop/app.py"):  # below, where their frameworks are installed
            continue
        seen += 1
        if block.language != "console":
            reader.write(block)
            if block.file == "test_receipts.py":
                command = f"python -m pytest -p no:cacheprovider --roost-dsn '{reader.dsn}' {block.file}"
                assert "1 passed" in reader.run(command)
            if block.file in ("more.py", "run_worker.py"):
                output = reader.run(f"python {block.file}")
                assert output == {"more.py": "cancelled\n", "run_worker.py": "1\n"}[block.file]
        elif block is operating:
            operate(reader, block)
        elif not block.text.startswith("$ pip install"):
            for command, shown in block.commands:
                assert timeless(reader.run(command)) == timeless(shown), command
    assert seen == 11


def operate(reader: Reader, block: Block) -> None:
    """Each command succeeds where there is something for it to do."""
    with Roost(reader.dsn) as roost, psycopg.connect(reader.dsn, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO roost.job_rows (queue, task, state, attempt, discarded_at)"
            " VALUES ('emails', 'send_receipt', 'discarded', 5, now())"
        )
        for command, shown in block.commands:
            if command == "roostctl reload":
                reload_a_daemon(reader, roost, command)
            elif not command.startswith("export"):
                assert reader.run(command), command
            assert shown == "", "the README shows output that this test does not compare"
        eventually(lambda: roost.get_job(2).state == "completed", "job that was cancelled, and then retried")
        assert roost.get_job(3).state == "cancelled"
        # What is left for the worker of the next snippet.
        for job in roost.list_jobs(state="available", limit=1000):
            roost.cancel(job.id)
        roost.enqueue("send_receipt", args={"order": 7}, queue="emails")


def reload_a_daemon(reader: Reader, roost: Roost, command: str) -> None:
    daemon = subprocess.Popen(
        ["roostd", "-c", "roost.toml"],
        cwd=reader.folder,
        env=reader.environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(lambda: [worker for worker in roost.list_workers() if worker.metadata.get("generation")], "worker")
        assert " ok " in reader.run(command)
    finally:
        daemon.terminate()
        _, log = daemon.communicate(timeout=60)
    assert daemon.returncode == 0, log


def written(reader: Reader, *names: str) -> None:
    """The files of these names; a schema to enqueue into."""
    for block in blocks(README.read_text()):
        if block.file in names:
            reader.write(block)
    with Roost(reader.dsn) as roost:
        roost.setup_schema()


def receipts(reader: Reader) -> list[tuple[int, str, int]]:
    """The order in the job's arguments, its queue, and how many orders there are."""
    with psycopg.connect(reader.dsn) as conn:
        return conn.execute(
            "SELECT (args ->> 'order')::int, queue, (SELECT count(*) FROM orders)::int FROM roost.jobs"
        ).fetchall()


@pytest.mark.skipif(importlib.util.find_spec("flask") is None, reason="Flask is not installed")
def test_the_flask_view_writes_an_order_and_its_job(reader: Reader) -> None:
    written(reader, "shop/jobs.py", "shop/app.py")
    (reader.folder / "client.py").write_text(
        "from shop.app import app\nprint(app.test_client().post('/orders', data={'item': 'a chair'}).json)\n"
    )
    assert reader.run("python client.py") == "{'order': 1}\n"
    assert receipts(reader) == [(1, "emails", 1)]


DJANGO = """
import os
import django
from django.conf import settings
from django.db import connection
from django.test import RequestFactory
from psycopg.conninfo import conninfo_to_dict

parts = conninfo_to_dict(os.environ["ROOST_DSN"])
database = {"ENGINE": "django.db.backends.postgresql", "NAME": parts["dbname"], "USER": parts["user"],
            "HOST": parts["host"], "PORT": parts["port"]}
settings.configure(
    DATABASES={"default": database}, INSTALLED_APPS=["shop"], DEFAULT_AUTO_FIELD="django.db.models.AutoField"
)
django.setup()
from shop import models, views

print(views.place_order(RequestFactory().post("/orders", {"item": "a chair"})).content.decode())
models.Order.objects.create = lambda **fields: models.Order(pk=2)
enqueue = views.enqueue

def enqueue_and_fail(*args, **options):
    enqueue(*args, **options)
    raise RuntimeError("after the enqueue")

views.enqueue = enqueue_and_fail
try:
    views.place_order(RequestFactory().post("/orders", {"item": "a table"}))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("django") is None, reason="Django is not installed")
def test_the_django_view_writes_an_order_and_its_job_or_neither(reader: Reader) -> None:
    written(reader, "shop/jobs.py", "shop/views.py")
    (reader.folder / "shop/models.py").write_text(
        "from django.db import models\n\n\nclass Order(models.Model):\n    item = models.TextField()\n\n"
        "    class Meta:\n        app_label = 'shop'\n        db_table = 'orders'\n"
    )
    (reader.folder / "shop/__init__.py").touch()
    (reader.folder / "client.py").write_text(DJANGO)
    assert reader.run("python client.py").splitlines() == ['{"order": 1}', "after the enqueue"]
    assert receipts(reader) == [(1, "emails", 1)]
