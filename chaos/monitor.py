"""Looks at processes while a campaign runs: who outlives whom, who is left unburied, and who grows.

The campaign is a subreaper, so a process that loses all of its ancestors becomes a child of the campaign's own: nothing
can hide. What it finds is judged in `checker`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

from chaos import fleet
from chaos.evidence import Sample, Stray
from chaos.fleet import now
from chaos.stage import Stage
from roostd import linux

STRAY_SECONDS = 1.0  # what a child may outlive its master by
ALLOWANCE_SECONDS = 2.0  # for a machine under load
_LOOK_SECONDS = 0.25
_SAMPLE_SECONDS = 1.0


class Monitor:
    def __init__(self, stage: Stage) -> None:
        self.strays: list[Stray] = []
        self.samples: list[Sample] = []
        self._stage = stage
        self._seen: dict[tuple[int, str], float] = {}
        self._family: dict[str, list[tuple[str, int]]] = {}  # whom each master's last sample was of
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor")

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        sampled_at = 0.0
        while not self._ended.wait(_LOOK_SECONDS):
            self._look()
            if now() - sampled_at > _SAMPLE_SECONDS:
                sampled_at = now()
                self.samples.extend(self._sample())

    def _look(self) -> None:
        found = dict(self._suspects())
        self._seen = {suspect: self._seen.get(suspect, now()) for suspect in found}
        for (pid, how), since in list(self._seen.items()):
            if now() - since > STRAY_SECONDS + ALLOWANCE_SECONDS:
                self.strays.append(Stray(since, pid, found[pid, how], how))
                if how == "orphan":
                    linux.kill_tree(pid)

    def _suspects(self) -> Iterator[tuple[tuple[int, str], str]]:
        reported = {stray.pid for stray in self.strays}
        for pid in self.orphans():
            if pid not in reported:
                yield (pid, "orphan"), fleet.title_of(pid)
        for master in self._stage.masters.values():
            if not master.runs or fleet.state_of(master.pid) == "T":
                continue
            if any(fleet.state_of(template) == "T" for template in master.templates()):
                continue
            for pid in linux.descendants_of(master.pid):
                if fleet.state_of(pid) == "Z" and pid not in reported:
                    yield (pid, "zombie"), f"below {master.name}"

    def orphans(self) -> list[int]:
        """The living that were started below a master and have lost it."""
        return [
            pid
            for pid in linux.children_of(os.getpid())
            if not fleet.title_of(pid).startswith("roostd: master")
            and fleet.state_of(pid) not in ("", "Z", "X")
            and _is_below(self._stage.folder, pid)
            and str(fleet.COMMAND) not in fleet.title_of(pid)  # a master that has not named itself yet
        ]

    def _sample(self) -> Iterator[Sample]:
        sockets = fleet.sockets()
        for master in self._stage.masters.values():
            if not master.is_whole():
                continue
            pids = [("master", master.pid)]
            pids += [("template", pid) for pid in master.templates()]
            pids += [("child", pid) for pid in master.children()]
            # The files of a child that was just forked are not yet with its master, nor those of a dead one closed.
            before, self._family[master.name] = self._family.get(master.name), pids
            if pids != before:
                continue
            for role, pid in pids:
                files, rss = fleet.open_files_of(pid), fleet.rss_bytes_of(pid)
                if files and rss:
                    yield Sample(now(), role, master.name, pid, in_words(files, sockets), rss)


def in_words(files: dict[int, str], sockets: dict[str, str]) -> tuple[str, ...]:
    """Those of a kind have the same word."""
    return tuple(sorted(sockets.get(link, link).partition(":[")[0] for link in files.values()))


def _is_below(folder: Path, pid: int) -> bool:
    """Whether a process has its working directory there, as all have that masters start."""
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")) == folder.resolve()
    except OSError:
        return False
