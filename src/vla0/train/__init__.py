"""Train checkpoints from a configuration and a dataset."""
