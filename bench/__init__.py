"""What `make bench` runs. See docs/benchmarks.md."""
