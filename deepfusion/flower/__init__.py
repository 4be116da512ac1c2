"""The network engine: the only folder that imports flwr."""
