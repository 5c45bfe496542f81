"""The routes, one module per noun. A route calls functions of `jobs` and holds no queries."""
