"""The supervisor: holds the database connections, claims jobs, hands them to children, writes what became of them.

One thread, an asyncio loop, and no user code: what may run, end or die is decided in core/, and carried out here.
"""
