"""Turns what a handler returned into JSON text that jsonb will take, or says why it can't be."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class BadResult(ValueError):
    """The handler's result can't be kept; the job fails with this."""


def _of_model(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__name__} is no JSON value")


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_of_model)


def encode_result(result: Any, max_bytes: int) -> bytes:
    """The result as UTF-8 JSON; pydantic models as their JSON form. Raises BadResult."""
    try:
        body = _encoder.encode(result).encode()
    except UnicodeEncodeError:
        raise BadResult("cannot keep the result: it holds a lone surrogate, which is no text") from None
    except (TypeError, ValueError) as error:
        raise BadResult(f"cannot keep the result: {error}; return JSON values only") from None
    except RecursionError:
        raise BadResult("cannot keep the result: it is nested too deeply") from None
    if len(body) > max_bytes:
        raise BadResult(
            f"cannot keep the result: it takes {len(body)} bytes as JSON, more than max_result_bytes ({max_bytes}): "
            "store the data elsewhere and return a reference"
        )
    if b"\\u0000" in body and _NUL.search(body.decode()):
        raise BadResult("cannot keep the result: it holds a NUL character, which PostgreSQL can't store")
    return body
