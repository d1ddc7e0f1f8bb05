"""Operations: a folder each, with a reference, a chunked XLA form and, where it pays, kernels."""
