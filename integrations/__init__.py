"""Thin adapters to the hosts; each imports its host, and none imports another."""
