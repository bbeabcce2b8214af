"""Runs ML Programs on PyTorch: package -> program -> one function per MIL operation -> arrays."""
