"""Writing passes: what can stand in a pipeline, described; skeletons, examples, the reference page."""
