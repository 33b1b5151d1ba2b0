"""How fast and how large Roost is: the real daemon on a real PostgreSQL, one question a file. Run `python -m bench`."""
