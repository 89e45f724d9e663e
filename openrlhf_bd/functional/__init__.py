"""Pure tensor functions: candidate sets, soft values, the Bellman Distill objective, cross-entropy. Torch only.

Shape suffixes: S states of a micro-batch (response positions of its rows, one after another), M candidates of all
states (ragged, CSR), V vocabulary, B rows, S1 = S + 1. Half-precision inputs are raised to float32, float64 is kept.
"""
