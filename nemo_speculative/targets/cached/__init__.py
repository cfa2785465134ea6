"""The target's hidden states on disk: captured once, read by any number of trainings.

A directory holds ``manifest.json`` (what computed them, and for what: :mod:`manifest`), and shards: a safetensors file
and its index each (:mod:`shards`), written by one rank (:mod:`writer`), found by the content of a document
(:mod:`store`).  Logits and probabilities are never stored: the head makes them anew.
"""
