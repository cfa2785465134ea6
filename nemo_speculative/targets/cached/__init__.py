"""The target's hidden states on disk ("features"): captured once, read by any number of trainings.

A feature directory holds ``manifest.json`` (which target computed them, for which drafts: :mod:`manifest`) and shards
(:mod:`shards`): files of documents (:mod:`documents`), which :mod:`store` looks up by content.
"""
