"""Every block of every page of docs/, followed page by page, in a folder and on a database of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from chaos.fleet import title_of
from roost_client import Roost
from tests.documented import Reader, blocks
from tests.system.daemon import eventually

pytestmark = pytest.mark.daemon

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"
# Figures and reports are of their day, and records of decisions show no more than what they decide.
LEFT_OUT = ("performance.md", "chaos.md", "chaos-report.md")
LANGUAGES = ("python", "console", "toml", "sql")
NOT_RUN = 4  # blocks that say that they are not; each more must be worth it
PAGES = {
    str(path.relative_to(DOCS)): blocks(path.read_text())
    for path in sorted([*DOCS.glob("*.md"), *DOCS.glob("how-to/*.md"), *DOCS.glob("reference/*.md")])
    if path.name not in LEFT_OUT
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """One with a name short enough for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="roost-docs-") as directory:
        yield Path(directory).resolve()


@pytest.fixture
def reader(folder: Path, dsn: str) -> Iterator[Reader]:
    """Has the handlers and the settings of the README."""
    with closing(Reader(folder, dsn)) as reader:
        for block in blocks(README.read_text()):
            if block.file in ("roost.toml", "shop/jobs.py"):
                reader.write(block)
        yield reader
    if (file := folder / "roostd.pid").exists():
        stop(int(file.read_text()), folder)


def stop(pid: int, folder: Path) -> None:
    """Ends the daemon that the page has started; nothing may be left of it."""
    if title_of(pid).startswith("roostd"):
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not processes_in(folder), lambda: f"end of {[title_of(pid) for pid in processes_in(folder)]}")


def processes_in(folder: Path) -> list[int]:
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if Path(os.readlink(f"/proc/{pid}/cwd")) == folder and pid != os.getpid():
                found.append(pid)
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@contextmanager
def operated(reader: Reader) -> Iterator[None]:
    """A daemon, a job 42 that waits, and three that have failed."""
    (reader.folder / "shop/jobs.py").write_text(
        "import time\nfrom roost_client import job\n\n"
        "@job('sleep')\ndef sleep(seconds):\n    time.sleep(seconds)\n\n@job('report')\ndef report(): ...\n"
    )
    settings = reader.folder / "roost.toml"
    settings.write_text(settings.read_text().replace("concurrency = 4", "concurrency = 2"))
    with psycopg.connect(reader.dsn) as conn, Roost(reader.dsn) as roost:
        conn.execute(
            "INSERT INTO roost.job_rows (task, state, attempt, discarded_at)"
            " SELECT 'report', 'discarded', 20, now() FROM generate_series(1, 3)"
        )
        conn.execute("SELECT setval(pg_get_serial_sequence('roost.job_rows', 'id'), 41)")
        roost.enqueue("report", queue="emails", scheduled_at=datetime.now(UTC) + timedelta(days=1), conn=conn)
    reader.run("roostd -c roost.toml > roostd.log 2>&1 & echo $! > roostd.pid")
    yield


@contextmanager
def with_a_role(reader: Reader) -> Iterator[None]:
    with psycopg.connect(reader.dsn, autocommit=True) as conn:
        conn.execute("CREATE ROLE app")
        yield
        conn.execute("DROP OWNED BY app")
        conn.execute("DROP ROLE app")


# What a page takes for granted, beside the settings, the handler and the schema of the README.
PREPARED: dict[str, Callable[[Reader], AbstractContextManager[None]]] = {
    "operating.md": operated,
    "privileges.md": with_a_role,
}


@pytest.mark.parametrize("page", [page for page, found in PAGES.items() if any(b.language in LANGUAGES for b in found)])
def test_what_a_page_shows_works_as_it_shows(reader: Reader, page: str) -> None:
    with PREPARED.get(page, nullcontext)(reader):
        for block in PAGES[page]:
            reader.follow(block)


def test_few_blocks_are_not_run() -> None:
    left_out = [(page, block) for page, found in PAGES.items() for block in found if block.left_out]
    assert len(left_out) <= NOT_RUN, left_out


def written(reader: Reader, *names: str) -> None:
    for block in PAGES["how-to/transactions.md"]:
        if block.file in names:
            reader.write(block)
    with psycopg.connect(reader.dsn) as conn:
        conn.execute("CREATE TABLE orders (id serial PRIMARY KEY, item text NOT NULL)")


def receipts(reader: Reader) -> list[tuple[int, str, int]]:
    """The order in the job's arguments, its queue, and how many orders there are."""
    with psycopg.connect(reader.dsn) as conn:
        return conn.execute(
            "SELECT (args ->> 'order')::int, queue, (SELECT count(*) FROM orders)::int FROM roost.jobs"
        ).fetchall()


FLASK = """
from shop import app

client = app.app.test_client()
print(client.post("/orders", data={"item": "a chair"}).json)
enqueue = app.enqueue

def enqueue_and_fail(*args, **options):
    enqueue(*args, **options)
    raise RuntimeError("after the enqueue")

app.enqueue = enqueue_and_fail
print(client.post("/orders", data={"item": "a table"}).status_code)
"""


@pytest.mark.skipif(importlib.util.find_spec("flask") is None, reason="Flask is not installed")
def test_the_flask_view_writes_an_order_and_its_job_or_neither(reader: Reader) -> None:
    written(reader, "shop/app.py")
    (reader.folder / "client.py").write_text(FLASK)
    assert reader.run("python client.py").splitlines() == ["{'order': 1}", "500"]
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
    written(reader, "shop/views.py")
    (reader.folder / "shop/models.py").write_text(
        "from django.db import models\n\n\nclass Order(models.Model):\n    item = models.TextField()\n\n"
        "    class Meta:\n        app_label = 'shop'\n        db_table = 'orders'\n"
    )
    (reader.folder / "shop/__init__.py").touch()
    (reader.folder / "client.py").write_text(DJANGO)
    assert reader.run("python client.py").splitlines() == ['{"order": 1}', "after the enqueue"]
    assert receipts(reader) == [(1, "emails", 1)]
