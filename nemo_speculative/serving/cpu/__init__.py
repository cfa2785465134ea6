"""What turns SGLang 0.5.23 into a CPU engine: a directory to put in front of PYTHONPATH.

``sgl_kernel`` stands in for the compiled package of that name, of which no CPU build is published.  ``sitecustomize``
is run by every Python that starts with this path, SGLang's subprocesses included.
"""
