"""The plan as a value, and what a user is told about it.

What a plan says, and how it is printed, saved and read back, is changed here. It knows rewritten graphs, of which it
reads a plan, and nothing of processes or calls.
"""

from autotp.plans.make_plan import announce, make_plan, plan_of
from autotp.plans.plan import Collective, Plan, Weight

__all__ = ["Collective", "Plan", "Weight", "announce", "make_plan", "plan_of"]
