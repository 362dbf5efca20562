"""One call of a parallelized module: guards, agreement of the ranks, the graph, outputs.

What happens between a user's call and the graph is changed here. It must not decide how a graph is rewritten; the cache
of graphs knows no ranks.
"""

from autotp.runtime.bound_call import BoundCall
from autotp.runtime.eager_region import EagerRegion
from autotp.runtime.graph_cache import GraphCache
from autotp.runtime.graph_runtime import GraphRuntime
from autotp.runtime.runtime import Runtime

__all__ = ["BoundCall", "EagerRegion", "GraphCache", "GraphRuntime", "Runtime"]
