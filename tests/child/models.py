"""A model in a module of its own, as an application has it."""

from __future__ import annotations

from pydantic import BaseModel


class Parcel(BaseModel):
    weight: float
    label: str = "none"
