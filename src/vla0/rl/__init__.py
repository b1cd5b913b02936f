"""Learn from success: reinforcement learning of a policy that writes actions as text."""
