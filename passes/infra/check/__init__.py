"""Checking a run: the values before and after each pass, held to what its kind promises."""
