"""A folder that vla0, LeRobot and transformers open: read, written, converted, fetched."""
