"""Serves a policy over the network, in openpi's websocket protocol.

The client imports no torch.
"""
