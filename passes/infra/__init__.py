"""What passes are made with: patterns, registry, pipelines, tests."""
