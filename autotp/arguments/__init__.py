"""A call's arguments as flat tensors, the state of modules among them, and what a call mutates.

Kinds of containers, objects and state that a call may have are added here. It must not know what a graph computes.
"""

from autotp.arguments.arguments import Arguments
from autotp.arguments.effects import Effects
from autotp.arguments.module_state import ModuleStateTracker
from autotp.arguments.mutations import Mutation
from autotp.arguments.object_tree import sharded_state
from autotp.arguments.snapshot import Snapshot

__all__ = ["Arguments", "Effects", "ModuleStateTracker", "Mutation", "Snapshot", "sharded_state"]
