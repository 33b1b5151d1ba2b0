"""One file a competitor: how it is set up, given jobs and started, tuned as its own documentation says.

A file here is all that a new competitor needs. It is imported by race/client.py and race/work.py only, in processes of
their own, so that what one needs never meets what another needs. It has

- `PEER`, what to say of it (race/peer.py);
- `client()`, an async context manager that gives a `Client`;
- `set_up()`, a coroutine that makes the schema, where there is one;
- `commands(children)`, the commands that together run jobs in that many processes;
- `run(children)`, what `python -m race.work NAME CHILDREN` does, where that is among the commands.

Every task of race/jobs.py must be there under its name, takes `number`, and is tried once. `hang` has a timeout of
HANG_TIMEOUT_SECONDS by whatever means there are.
"""
