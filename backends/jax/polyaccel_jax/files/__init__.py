"""Files of Orbax."""
