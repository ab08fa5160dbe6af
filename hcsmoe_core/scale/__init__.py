"""Models larger than memory, streamed layer by layer, and ranks that share a capture."""
