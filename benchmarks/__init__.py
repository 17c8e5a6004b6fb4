"""The engine against its peers: the same work, in one run, equity checked before time is taken. `make bench`."""
