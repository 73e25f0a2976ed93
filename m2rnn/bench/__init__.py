"""The operator measured: times beside what bounds them."""
