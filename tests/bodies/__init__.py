"""The table of scan bodies: everything that somebody may hand to `lax.scan`.

Beside the steps of `cases`, which any recurrent layer may look like, these are what an engine
that takes bodies apart has to survive: other ways to write the same layer, states that are not
vectors of floats, control flow, derivative rules of the user's own, odd dtypes and shapes.

A body is entered by its maker ``make(consts) -> f``, ``f`` as `lax.scan` takes it. All float
leaves of consts, init and xs are differentiated; axes have different lengths.
"""

# Each module enters its bodies when it is imported.
from bodies import algebra, dtypes, layers, rules, states, table
from bodies.rules import spike, straight_through
from bodies.table import BODIES, TIME

__all__ = [
    "BODIES",
    "TIME",
    "algebra",
    "dtypes",
    "layers",
    "rules",
    "spike",
    "states",
    "straight_through",
    "table",
]
