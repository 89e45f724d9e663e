"""Ragged gather-dot: logits at the candidates alone, from hidden states and those rows of the output embedding.

`ragged_dot` picks the form: Triton kernels on CUDA, blocked torch elsewhere. Both give float32 from any float type
(float64 from float64) and sum in that type, in an order that depends on the shapes alone.
"""
