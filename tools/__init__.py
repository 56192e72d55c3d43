"""Scripts for users, benchmarks and the reproduction of the paper."""
