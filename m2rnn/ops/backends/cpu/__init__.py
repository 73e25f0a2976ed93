"""CPU kernels compiled by numba: layout, vectors, machine code."""
