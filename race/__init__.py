"""Roost beside its peers: the same work through each, in one run, on the same machine. Run `python -m race`."""
