"""Preparation of datasets of any shape as one validated JSONL."""
