"""The policy over the network, in openpi's websocket protocol.

The client's side imports no torch.
"""
