"""Measurements that a person starts; each prints what it measured and on which machine."""
