"""Steps seen before they are paid for: chips, topologies, what a compiler said of a step, and the table of it. Knows no framework."""
