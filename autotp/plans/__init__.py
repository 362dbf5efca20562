"""The plan as a value, and what a user is told about it.

Change it to plan other facts, or to print, save and load plans in another way. It reads plans off rewritten graphs, and
knows nothing of processes or calls.
"""

from autotp.plans.make_plan import announce, make_plan, plan_of
from autotp.plans.plan import Collective, Plan, Weight

__all__ = ["Collective", "Plan", "Weight", "announce", "make_plan", "plan_of"]
