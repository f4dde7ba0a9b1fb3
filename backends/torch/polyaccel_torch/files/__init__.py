"""Files of torch and of its distributed checkpoints, read without running what they hold."""
