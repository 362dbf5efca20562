"""Dense against parallel, in numbers: simulation of all ranks in one process, and comparison.

Tolerances, reports and further ways to run all ranks belong here. It must not know how graphs are rewritten: a
comparison that trusts the compiler proves nothing.
"""

from autotp.verification.report import Report
from autotp.verification.simulation import Simulation, simulate
from autotp.verification.verify import verify

__all__ = ["Report", "Simulation", "simulate", "verify"]
