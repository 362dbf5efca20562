"""From a captured graph to the program that one rank runs.

The package rewrites, proves, lowers and compiles graphs, in this order, and prints them. It knows no processes and no
calls: a program is made of a captured graph, a number of ranks and layouts.
"""

from autotp.program.graph_text import graph_dot, graph_text
from autotp.program.lowered_graph import LoweredGraph
from autotp.program.rank_graph import RankGraph
from autotp.program.sharded_program import ShardedProgram, shard_graph

__all__ = ["LoweredGraph", "RankGraph", "ShardedProgram", "graph_dot", "graph_text", "shard_graph"]
