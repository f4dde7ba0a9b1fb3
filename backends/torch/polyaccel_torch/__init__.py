"""The torch adapter: PyTorch on CPU and CUDA, one process or DistributedDataParallel. Importing it imports no framework."""
