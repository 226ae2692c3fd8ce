"""Tools to see what happened in a loop, and why a meta-gradient is missing, zero or not finite."""

from diffopt.inspect._explain import Explanation as Explanation, Row as Row, explain as explain
from diffopt.inspect._graph import Graph as Graph, Node as Node, graph as graph
from diffopt.inspect._trace import Event as Event, Norms as Norms, Trace as Trace
