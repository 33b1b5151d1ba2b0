"""A connection string is shown without its secrets, or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roostd.config import redact_dsn

NOTHING = "(a connection string that cannot be parsed)"


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql:///app", "dbname=app"),
        ("postgresql://", ""),
        ("dbname=app", "dbname=app"),
        ("postgresql://app:hunter2@db:5433/shop", "user=app password=*** dbname=shop host=db port=5433"),
        ("postgres://app:hunter2%40%2f@[::1]/shop", "user=app password=*** dbname=shop host=::1"),
        ("postgresql://app:hunter2@a:1,b:2/shop", "user=app password=*** dbname=shop host=a,b port=1,2"),
        ("postgresql://app@db/shop?password=hunter2", "user=app password=*** dbname=shop host=db"),
        ("postgresql://app:hunter2@db/shop?password=", "user=app password=*** dbname=shop host=db"),
        ("postgresql://db/shop?sslpassword=hunter2", "dbname=shop host=db sslpassword=***"),
        ("postgresql:///shop?passfile=/etc/pass", "passfile=/etc/pass dbname=shop"),
        ("postgresql://%2Frun%2Fpg/shop", "dbname=shop host=/run/pg"),
        ("postgresql://%40socket/shop", "dbname=shop host=@socket"),
        ("host=db password=hunter2 user=app", "user=app password=*** host=db"),
        ("host = db password = 'hun ter2\\''", "password=*** host=db"),
        ("password=hunter2 password=hunter3", "password=***"),
        ("host=@socket user=app@server", "user=app@server host=@socket"),
        ("application_name='a b' dbname=x", "dbname=x application_name='a b'"),
    ],
)
def test_secrets_are_masked_in_every_form(dsn: str, shown: str) -> None:
    assert redact_dsn(dsn) == shown


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        "hunter2",
        "host=db hunter2",
        "password='hunter2",
        "secret=hunter2",
        "mysql://app:hunter2@db/shop",
        "postgresql://app:hunter2%zz@db/shop",
        "postgresql://app:hunter2%00@db/shop",
        "postgresql://app:hunter2%ff@db/shop%ff",
        "postgresql://app:x@hunter2@db/shop",
        "postgresql://app:hunter2@@db/shop",
        "postgresql://app:123/@db/shop",
        "postgresql://app:123?host=x@db/shop",
        "postgresql://app:hunter2/x@db/shop",
        "postgresql://app:x/hunter2@db/shop",
        "postgresql://us@er:hunter2@db/shop",
        "postgresql://app:hunter2",
        "dbname=postgresql://app:hunter2@db/shop",
        "host=db\0password=hunter2",
        "host=\udcff",
    ],
)
def test_what_cannot_be_parsed_or_was_likely_meant_otherwise_is_not_shown(dsn: str) -> None:
    assert redact_dsn(dsn) == NOTHING


@given(st.text(min_size=4).filter(lambda secret: not secret.isdecimal() and secret not in "postgresql://app@db/shop"))
def test_an_unescaped_password_in_a_uri_never_shows(password: str) -> None:
    shown = redact_dsn(f"postgresql://app:{password}@db/shop")
    assert shown in (NOTHING, "user=app password=*** dbname=shop host=db")


@given(st.text())
def test_any_text_at_all_is_either_shown_or_not(text: str) -> None:
    assert isinstance(redact_dsn(text), str)
    assert isinstance(redact_dsn(f"postgresql://{text}"), str)
