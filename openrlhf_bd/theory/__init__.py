"""The paper's theory in tables: small MDPs where every object of Definitions 1-7 and Eq. 1-17 is an array.

Nothing here trains a model. `tests/property` holds Propositions 1-4 and the facts around them against these functions,
ties the loss of `functional` to them, and `openrlhf-bd theory` prints and draws what they measure. NumPy, float64.
"""
