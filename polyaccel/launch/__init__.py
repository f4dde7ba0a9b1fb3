"""Process starters, and what a started process finds out about its job."""
