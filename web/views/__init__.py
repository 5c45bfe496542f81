"""View models: pure functions from rows of `jobs` to what a page shows."""
