"""The method of VLA-0: observations, actions, and the text that stands for actions."""
