"""The drugs, doses and times in a label of a perturbation."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

_DOSE = re.compile(
    r"(.+?)[\s_@-]+(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([pnuµm]?M|[nuµm]?g/ml)"
    r"(?:[\s_@-]+(\d+(?:\.\d+)?)\s*(min|h|hr|hrs|hours?|d|days?))?",
    re.I,
)
_HOURS = {"m": 1 / 60, "h": 1.0, "d": 24.0}  # of a unit of time, by its first letter


@dataclass(frozen=True)
class Treatment:
    """A drug, its dose and how long it was there, apart."""

    drug: str
    dose: float
    unit: str
    hours: float | None = None  # None: the label does not say


def treatments_of(label: str) -> tuple[Treatment, ...]:
    """Drugs, doses and times in a label: [('DMSO_TF', 0.0, 'uM')], Nutlin-3a_0.5uM, Nutlin-3a_0.5uM_48h; else ()."""
    if len(label) < 1000 and label.startswith("[("):
        try:
            rows = ast.literal_eval(label)
            return tuple(Treatment(str(drug), float(dose), str(unit)) for drug, dose, unit in rows)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return ()
    found = _DOSE.fullmatch(label.strip())
    if found is None:
        return ()
    hours = float(found[4]) * _HOURS[found[5][0].lower()] if found[4] else None
    return (Treatment(found[1], float(found[2]), found[3], hours),)
