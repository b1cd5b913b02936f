"""A LeRobot dataset on the disk, to batches."""
