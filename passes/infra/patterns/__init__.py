"""The pattern language, its one matcher, and passes made of a pattern."""
