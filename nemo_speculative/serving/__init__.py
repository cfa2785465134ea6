"""Serving a draft with SGLang: its command line, its process, and stand-in kernels for its CPU engine."""
