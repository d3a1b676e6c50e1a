"""Showing a run: listings, diffs, times, remarks and the HTML view."""
