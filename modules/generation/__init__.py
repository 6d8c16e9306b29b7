"""Generated texts, and the likelihood of given ones."""
