"""How fast can an application enqueue, one by one and in bulk, while nobody runs the jobs?"""

from __future__ import annotations

from race.rig import Place
from race.scale import Scale


def measure(place: Place, scale: Scale, _pace: float) -> dict[str, float]:
    single = place.ask("each", "noop", 1, scale.enqueue_single)["seconds"]
    many = place.ask("many", "noop", 1, scale.enqueue_many)["seconds"]
    return {"enqueue_single": scale.enqueue_single / single, "enqueue_many": scale.enqueue_many / many}
