"""How a handler lets its test know how far it is."""

from __future__ import annotations


def tell(post: str, word: str = "started") -> None:
    with open(post, "w") as file:
        file.write(word + "\n")
