"""One adapter per tracking service. Each imports its vendor when it starts, on its own thread, and knows nothing of the others."""
