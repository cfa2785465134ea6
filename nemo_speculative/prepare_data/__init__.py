"""From other people's datasets to one validated JSONL."""
