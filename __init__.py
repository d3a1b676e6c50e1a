"""vacc-opt: registered graph passes that turn an unmodified LLM into a tiled kernel schedule for VACC accelerators."""

from vacc_opt._version import __version__

__all__ = ["__version__"]
