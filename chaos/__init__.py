"""The fault campaign: jobs run by real daemons while they, their processes and their database are broken on purpose.

A seed decides what is enqueued and what is broken (`plan`, from the tables in `jobs` and `faults`), `campaign` carries
it out, and `checker` judges it by a ledger that Roost has no hand in. docs/chaos.md says what is checked, and what not.
"""
