"""A call's arguments as flat tensors, with the state of modules among them, and the mutations that a call makes.

New kinds of containers, objects and state in a call's arguments are added here. This package must not know what a
graph computes.
"""

from autotp.arguments.arguments import Arguments
from autotp.arguments.effects import Effects
from autotp.arguments.module_state import ModuleStateTracker
from autotp.arguments.mutations import Mutation
from autotp.arguments.object_tree import sharded_state
from autotp.arguments.snapshot import Snapshot

__all__ = ["Arguments", "Effects", "ModuleStateTracker", "Mutation", "Snapshot", "sharded_state"]
