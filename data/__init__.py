"""Documents, tokens and batches: everything between a source of text and a training step.

Nothing here imports JAX, and TensorFlow is never needed to read.
"""
