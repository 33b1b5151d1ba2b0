"""What a job left behind is killed, reaped, and named once."""

from __future__ import annotations

import json
import subprocess
import sys

# Leaves five daemons that sleep, each with a child, and five that end at once, and has them ended until none is left.
_ADOPTER = """
import json, os, time
from roostd import linux
from roostd.master.orphans import Orphans

linux.adopt_orphans()
reading, writing = os.pipe()
middle = os.fork()
if middle == 0:
    for number in range(10):
        if os.fork() == 0:
            os.setsid()
            if number % 2:
                os._exit(0)
            if os.fork() != 0:
                os.write(writing, b"%d " % os.getpid())
            time.sleep(600)
    os._exit(0)
os.waitpid(middle, 0)
sleeping = []
while len(sleeping) < 5:
    sleeping += os.read(reading, 4096).split()
orphans, killed = Orphans(), []
deadline = time.monotonic() + 60
while list(linux.children_of(os.getpid())) and time.monotonic() < deadline:
    killed += orphans.end(set())
left = linux.descendants_of(os.getpid())
print(json.dumps({"sleeping": [int(pid) for pid in sleeping], "killed": killed, "left": left}))
"""


def test_each_orphan_is_killed_named_once_and_reaped() -> None:
    run = subprocess.run([sys.executable, "-c", _ADOPTER], capture_output=True, text=True, timeout=100, check=True)
    told = json.loads(run.stdout)
    assert told["left"] == []
    assert len(told["killed"]) == len(set(told["killed"]))
    assert set(told["sleeping"]) <= set(told["killed"])
