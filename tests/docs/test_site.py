"""The site is built without a warning, and its reference leaves nothing out."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import roost_client
import roostd
from roostd.config.kinds import KINDS
from roostd.ctl import roostctl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--fresh-env", "--nitpicky", "--fail-on-warning", "--keep-going"]
    recipe = " ".join(["-m sphinx", *options, "docs"])
    assert recipe in (ROOT / "Makefile").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "docs", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def described(site: Path) -> set[str]:
    """The names of which the site has a description."""
    _, _, _, _, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    return {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}


def test_everything_public_is_described(site: Path) -> None:
    names = {f"roost_client.{name}" for name in roost_client.__all__} | {"roostd.Worker"}
    assert names <= described(site)
    operations = {
        f"roost_client.{cls.__name__}.{name}"
        for cls in (roost_client.Roost, roost_client.AsyncRoost)
        for name in vars(cls)
        if not name.startswith("_")
    }
    assert operations <= described(site)


def test_every_setting_has_its_line(site: Path) -> None:
    page = (site / "reference" / "configuration.html").read_text()
    for section, kinds in KINDS.items():
        assert f">[{section}]<" in page
        for key in kinds:
            assert f">{key}</span>" in page, f"{section}.{key}"


def commands(command: click.Command, path: str) -> Iterator[str]:
    yield path
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")


def test_every_command_says_what_its_help_says(site: Path) -> None:
    page = (site / "reference" / "cli.html").read_text()
    for path in ["roostd", *commands(roostctl, "roostctl")]:
        assert f"Usage: {path} [OPTIONS]" in page


def test_the_readme_leads_nowhere_but_to_what_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_pages_need_nothing_from_elsewhere(site: Path) -> None:
    assert roostd.__version__ in (site / "index.html").read_text()
    for page in site.rglob("*.html"):
        text = page.read_text()
        for what in ('src="http', 'rel="stylesheet" href="http', "@import url(http"):
            assert what not in text, f"{page.name} loads {what}"
