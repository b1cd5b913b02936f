"""Read, write, convert and fetch checkpoint folders that vla0, LeRobot and transformers open."""
