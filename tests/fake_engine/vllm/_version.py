"""The version, in a file like that of vLLM."""

__version__ = "0.32.0"
