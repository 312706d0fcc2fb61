"""The semantic cache by itself: labelled questions replayed through several caches, on the same embeddings."""
