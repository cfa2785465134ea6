"""A directory that makes SGLang 0.5.23 run on a CPU when it is put in front of PYTHONPATH.

``sgl_kernel`` replaces the compiled package of that name, of which no CPU build is published.  ``sitecustomize`` is run
by every Python that starts with this path, including SGLang's subprocesses.
"""
