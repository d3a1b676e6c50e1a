"""From a failure to a small test: reproducers, bisection, reduction."""
