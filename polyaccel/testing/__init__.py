"""For authors of backends, and for tests without a framework: a complete small backend, and the suite every backend runs."""
