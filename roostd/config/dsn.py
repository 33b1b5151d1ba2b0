"""Connection strings: whether libpq takes one, and how to show it without its secrets.

libpq's own parser decides. Its error messages quote the string, so none of them may get out of here.
Must not connect.
"""

from __future__ import annotations

import re

from psycopg import OperationalError, pq
from psycopg.conninfo import make_conninfo

EXPECTED = "a libpq connection string or URI; in a URI, write @ / : of a password as %40 %2F %3A"


def redact_dsn(dsn: str) -> str:
    """The string in key=value form with `***` for each secret; nothing of it where it can't be parsed."""
    try:
        options = parse_dsn(dsn)
    except ValueError:
        return "(a connection string that cannot be parsed)"
    return make_conninfo(**{keyword: "***" if secret else value for keyword, value, secret in options})


def parse_dsn(dsn: str) -> list[tuple[str, str, bool]]:
    """Keyword, value and whether it is a secret, of each option. Raises ValueError, which says nothing."""
    if not dsn.strip() or "\0" in dsn:
        raise ValueError
    try:
        # libpq marks with "*" what a form should hide, with "D" what is for debugging, some of it keys.
        options = [
            (option.keyword.decode(), option.val.decode(), bool(option.dispchar))
            for option in pq.Conninfo.parse(dsn.encode())
            if option.val is not None
        ]
    except (OperationalError, UnicodeError):
        raise ValueError from None
    if _may_show_a_password(dsn, {keyword: value for keyword, value, _ in options}):
        raise ValueError
    return options


def _may_show_a_password(dsn: str, options: dict[str, str]) -> bool:
    """Whether a part of it is likely the tail of a password.

    In a URI, libpq takes what follows an unescaped @, / or ? in the password for a host, port, database or option.
    """
    if any("://" in options.get(keyword, "") for keyword in ("host", "hostaddr", "dbname")):
        return True
    if re.fullmatch("[0-9, ]*", options.get("port", "")) is None:
        return True
    scheme, _, rest = dsn.partition("://")
    if not scheme.strip().startswith("postgres"):
        return False
    before_query, _, query = rest.partition("?")
    authority, _, path = before_query.partition("/")
    return authority.count("@") > 1 or "@" in path or ("@" in query and "@" not in authority)
