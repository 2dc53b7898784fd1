"""One rule an operator: what its output's axes are made of, and what has to be equal for it to work.

A rule takes the tracer, the node and its arguments by schema name, and returns the traced output (a list of them for
several). It may leave records: literals and rewrites for surgery, contractions and restrictions for the reference,
costs. To add an operator: write its rule (or reuse one), put it into the table of its topic, and give it a case in
`tests/compression/graph/operators.py`.
"""

from worker.compression.graph.rules import elementwise, norms, products, recurrent, shapes, slices, weights
from worker.compression.graph.rules.common import Rule

RULES: dict[object, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **slices.RULES,
    **norms.RULES,
    **products.RULES,
    **recurrent.RULES,
    **weights.RULES,
}
"""Operator → rule. What is not here freezes what it touches."""
