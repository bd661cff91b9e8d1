"""Sites that lie, for tests and benchmarks, and for whoever wants to try a federation of their own."""
