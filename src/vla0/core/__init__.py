"""The method: what an observation and an action are, how actions become text and text becomes
actions.
"""
