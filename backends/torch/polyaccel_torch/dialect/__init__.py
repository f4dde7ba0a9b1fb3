"""What is torch about a torch script, without an engine: modules, optimizers and loaders. Works with every engine that runs them."""
