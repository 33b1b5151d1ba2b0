"""The template process: `python -m roostd.template FD MASTER_PID`, as master/templates.py starts it."""

from __future__ import annotations

import sys

from roostd.template.run import main

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
