"""capture: one call of a module as one functional graph, or an error that says why there is none.

This package decides how capture reads a module, undoes its side effects, lifts its state into inputs, and refuses what
a graph cannot hold. It must know nothing of ranks or layouts: a captured graph is dense.
"""

from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph, DenseShapes
from autotp.capture.example_inputs import ExampleInputs, example_call
from autotp.capture.graph_breaks import GraphBreak
from autotp.capture.outputs import OutputSpec

__all__ = ["CapturedGraph", "DenseShapes", "ExampleInputs", "GraphBreak", "OutputSpec", "capture", "example_call"]
