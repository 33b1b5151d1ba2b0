"""Roost's supervisor daemon: runs jobs from PostgreSQL in child processes that it can stop and kill."""

__version__ = "0.1.0"
