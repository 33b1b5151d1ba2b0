"""What docs/how-to/testing.md shows works as it stands there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "testing.md"

FILES = {
    "conftest.py": "import place\n",
    "place.py": """
from roost_client import enqueue, job

@job("send_receipt", queue="emails")
def send_receipt(order):
    return f"receipt {order} sent"

def place_order(conn, item):
    if not item:
        return None
    [order] = conn.execute("INSERT INTO orders (item) VALUES (%s) RETURNING id", [item]).fetchone()
    enqueue(send_receipt, args={"order": order}, conn=conn)
    return order
""",
    "shop/__init__.py": "",
    "shop/app.py": """
from flask import Flask, request
from place import place_order

app = Flask(__name__)

def connect():
    raise AssertionError("a test replaces this")

@app.post("/orders")
def place():
    with connect() as conn:
        return {"order": place_order(conn, request.form["item"])}
""",
}
DJANGO = {
    "shop/models.py": """
from django.db import models

class Order(models.Model):
    item = models.TextField()

    class Meta:
        db_table = "orders"
""",
    "shop/migrations/__init__.py": "",
    "shop/migrations/0001_initial.py": """
from django.db import migrations, models

from roost_client import schema

class Migration(migrations.Migration):
    operations = [
        migrations.CreateModel(
            "Order", [("id", models.AutoField(primary_key=True)), ("item", models.TextField())], {"db_table": "orders"}
        ),
        migrations.RunPython(lambda apps, editor: schema.apply_migrations(editor.connection.connection)),
    ]
""",
    "shop/urls.py": """
from django.db import connection, transaction
from django.http import JsonResponse
from django.urls import path
from shop.models import Order
from place import send_receipt
from roost_client import enqueue

@transaction.atomic
def place(request):
    order = Order.objects.create(item=request.POST["item"])
    enqueue(send_receipt, args={"order": order.pk}, conn=connection.connection)
    return JsonResponse({"order": order.pk})

urlpatterns = [path("orders", place)]
""",
    "run.py": """
import os
import sys
import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

parts = conninfo_to_dict(os.environ["ROOST_DSN"])
database = {"ENGINE": "django.db.backends.postgresql", "NAME": parts["dbname"], "USER": parts["user"],
            "HOST": parts["host"], "PORT": parts["port"], "TEST": {"NAME": parts["dbname"] + "_django"}}
settings.configure(
    DATABASES={"default": database}, INSTALLED_APPS=["shop"], DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    ROOT_URLCONF="shop.urls", USE_TZ=True,
)
django.setup()
from django.test.runner import DiscoverRunner
sys.exit(DiscoverRunner(interactive=False).run_tests(["tests"]))
""",
    "tests/__init__.py": "",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def snippets() -> dict[str, str]:
    found = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    return {name: f"# {name}\n{text}" for name, text in found}


def run(folder: Path, dsn: str, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "ROOST_DSN": dsn, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("flask") is None, reason="Flask is not installed")
def test_the_tests_with_pytest_pass(dsn: str, tmp_path: Path) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute("CREATE TABLE orders (id serial PRIMARY KEY, item text NOT NULL)")
    write(tmp_path, FILES)
    write(tmp_path, {name: text for name, text in snippets().items() if "/" not in name})
    ran = run(tmp_path, dsn, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", "--roost-dsn", dsn)
    assert "3 passed" in ran


@pytest.mark.skipif(importlib.util.find_spec("django") is None, reason="Django is not installed")
def test_the_test_with_django_passes(dsn: str, tmp_path: Path) -> None:
    write(tmp_path, {**FILES, **DJANGO, "tests/test_views.py": snippets()["tests/test_views.py"]})
    assert "Ran 1 test" in run(tmp_path, dsn, "run.py")
