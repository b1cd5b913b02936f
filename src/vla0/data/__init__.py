"""Read LeRobot datasets from disk and make batches of them."""
