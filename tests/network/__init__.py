"""Jobs over several hosts, which are namespaces of this machine (tests/network/hosts.py)."""
