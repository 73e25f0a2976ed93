"""What the sizes of a layer must be."""

from numbers import Integral


def check_sizes(**sizes: object) -> None:
    """Raise a ValueError for a size that is not a positive whole number, by its name; None is one to be chosen."""
    for name, size in sizes.items():
        if size is None:
            continue
        if not isinstance(size, Integral):
            raise ValueError(f"{name} must be a whole number, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
