"""What the tests of the pages rely on: that a block is found as it is meant, and that a difference is seen."""

from __future__ import annotations

import pytest

from tests.documented import blocks, is_as_shown

PAGE = """
# Title

```python
# shop/jobs.py
x = 1
```

Text.

```python
print(2)
```

```text
2
```

<!-- not run: it changes the machine -->
```console
$ rm -rf data
$ ls
a  b
c
```

```text
a diagram
```
"""


def test_blocks_are_found_with_their_names_outputs_and_marks() -> None:
    named, run, shown, left_out, diagram = blocks(PAGE)
    assert (named.language, named.file, named.left_out) == ("python", "shop/jobs.py", "")
    assert (run.file, run.shown) == (None, "2\n")
    assert (shown.language, diagram.language) == ("text", "text")
    assert left_out.left_out == "not run: it changes the machine"
    assert left_out.commands == [("rm -rf data", ""), ("ls", "a  b\nc\n")]


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("ID  STATE\n 1  completed\n", "ID  STATE\n1   completed\n"),
        ("at 2026-01-31T09:00:00Z\n", "at 2027-02-01T10:00:00Z\n"),
        ("at 2026-01-31T09:00:00.123+00:00\n", "at 2026-01-31T09:00:00.456789+00:00\n"),
        ("pid 4711, 3s\n", "pid 12345, 59s\n"),
        ("host-1  running\n", "...  running\n"),
        ("", ""),
    ],
)
def test_what_differs_from_run_to_run_is_the_same(printed: str, shown: str) -> None:
    assert is_as_shown(printed, shown)


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("1\n", "2\n"),
        ("1\n", ""),
        ("", "1\n"),
        ("completed\n", "discarded\n"),
        ("1\n2\n", "1\n"),
        ("host-1  draining\n", "...  running\n"),
    ],
)
def test_any_other_difference_is_one(printed: str, shown: str) -> None:
    assert not is_as_shown(printed, shown)
