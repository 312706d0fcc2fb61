"""The servers that `make serve` runs on one plain machine, and the supervisor that runs them."""
