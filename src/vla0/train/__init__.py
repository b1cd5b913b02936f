"""From a configuration and a dataset to checkpoints."""
