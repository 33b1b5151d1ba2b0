"""The signals between master, template and child, and what each asks for; the one exit status that tells something.

Real-time numbers, because libraries and handlers use USR1 and USR2 for themselves.
"""

from __future__ import annotations

import signal

SOFT = signal.SIGRTMIN + 2  # read the control channel: a running job is called off
DUMP = signal.SIGRTMIN + 3  # write every thread's stack to the dump file, from C, whatever the handler is doing

EXIT_UNUSABLE = 70  # EX_SOFTWARE: a handler has broken what the child needs to report its job, or to read another
