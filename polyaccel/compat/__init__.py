"""Accelerate's module names. `import polyaccel.state` finds `polyaccel.compat.state`, and so on; nothing in the core imports this.

Each module is thin: names, defaults and meaning are Accelerate's, the work is done by the core.
"""
