"""All rows of the fault table, in its order."""

import tests.faults.damage
import tests.faults.kills
import tests.faults.lost
import tests.faults.not_finite
import tests.faults.replicas
import tests.faults.stops
import tests.faults.two_runs  # noqa: F401
from tests.faults.table import ROWS

__all__ = ["ROWS"]
