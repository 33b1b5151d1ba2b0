"""Enqueue in a transaction: an order and the job that mails its receipt exist together, or neither does.

export ROOST_DSN=postgresql:///app
roostctl migrate up
python examples/orders.py
"""

from __future__ import annotations

import os
from pathlib import Path

import psycopg

from roost_client import enqueue, job


@job("send_receipt", queue="emails", max_attempts=5, timeout_seconds=30)
def send_receipt(order: int, outbox: str = "outbox") -> str:
    """Mails a receipt: here, into a file. It may run twice, so it writes the same file each time."""
    Path(outbox).mkdir(exist_ok=True)
    receipt = Path(outbox, f"receipt-{order}.txt")
    receipt.write_text(f"Thank you for order {order}.\n")
    return str(receipt)


def place_order(conn: psycopg.Connection, item: str) -> tuple[int, int]:
    """Write an order and enqueue its receipt, in the transaction that `conn` is in; return the ids of both."""
    row = conn.execute("INSERT INTO orders (item) VALUES (%s) RETURNING id", [item]).fetchone()
    assert row is not None
    order: int = row[0]
    return order, enqueue(send_receipt, args={"order": order}, conn=conn)


def main() -> None:
    with psycopg.connect(os.environ["ROOST_DSN"]) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS orders (id serial PRIMARY KEY, item text NOT NULL)")
        order, job_id = place_order(conn, "a chair")
        print(f"order {order} is placed; its receipt is job {job_id}")

    # Here the transaction ends in an error: no order, no job.
    try:
        with psycopg.connect(os.environ["ROOST_DSN"]) as conn:
            place_order(conn, "a table")
            raise RuntimeError("the card was declined")
    except RuntimeError as error:
        print(f"no order, no receipt: {error}")


if __name__ == "__main__":
    main()
