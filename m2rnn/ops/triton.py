"""The portable GPU backend, in Triton."""
