"""From a captured graph to the program that one rank runs.

Rewriting, proving, lowering and compiling are called in their order here, and graphs are printed. It knows no processes
and no calls: a program is made of a captured graph, a degree and layouts.
"""

from autotp.program.graph_text import graph_dot, graph_text
from autotp.program.lowered_graph import LoweredGraph
from autotp.program.rank_graph import RankGraph
from autotp.program.sharded_program import ShardedProgram, shard_graph

__all__ = ["LoweredGraph", "RankGraph", "ShardedProgram", "graph_dot", "graph_text", "shard_graph"]
