"""Loading of batches: order and length buckets, and the caches on disk."""
