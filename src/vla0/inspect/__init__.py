"""A dataset, looked at before it is trained on."""
