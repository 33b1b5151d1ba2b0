"""Three tasks over files, as an application might have them. Each may run twice and gives the same result."""

from __future__ import annotations

import hashlib
import re
import zlib
from pathlib import Path

from roost_client import job

_WORD = re.compile(rb"[A-Za-z_]\w*")


@job("hash_file", queue="files", timeout_seconds=30)
def hash_file(path: str) -> str:
    """The file's SHA-256, in hex. A handler's result is kept with its job, as JSON."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@job("compress_file", queue="files", timeout_seconds=30)
def compress_file(path: str, level: int = 6) -> dict[str, int]:
    """How large the file is, and how large it would be compressed."""
    content = Path(path).read_bytes()
    return {"bytes": len(content), "compressed_bytes": len(zlib.compress(content, level))}


@job("count_words", queue="files", timeout_seconds=30)
def count_words(path: str) -> int:
    """How many words the file has."""
    return len(_WORD.findall(Path(path).read_bytes()))
