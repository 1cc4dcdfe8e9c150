"""Stands for vLLM where tests start a server: only what `Server` and `find_engine` look at."""
