"""Which ranks there are, how they exchange messages and vectors, and which part of a sharded tensor each one holds."""
