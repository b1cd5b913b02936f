"""How fast this machine is at what matters."""
