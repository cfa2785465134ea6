"""Serving a draft with SGLang: the command, the process, and what it takes on a CPU."""
