"""Compile, store and run models: the artifact directory, the engines that execute it, and text generation."""
