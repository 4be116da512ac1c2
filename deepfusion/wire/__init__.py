"""Tensors to bytes, bytes to shards, and the gate that refuses hostile uploads."""
