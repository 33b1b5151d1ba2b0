"""Entry point of the template process: `python -m roostd.template FD MASTER_PID`, started by master/templates.py alone."""

from __future__ import annotations

import sys

from roostd.template.run import main

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
