"""Registered passes over the graph: one file a pass, grouped by what they are for."""
