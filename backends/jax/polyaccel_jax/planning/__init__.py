"""A step compiled for devices that are not here: shapes in place of arrays, and what the compiler says of the programs."""
