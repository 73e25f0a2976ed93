"""What the operators share: choice of a backend, checks, dtypes, compiled code."""
