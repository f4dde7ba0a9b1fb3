"""How parameters are cut over the mesh: rules by name, what common names and plans mean, and the specs that follow."""
