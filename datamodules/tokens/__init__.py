"""Texts as tokens: tokenised rows, conversations, padded or packed batches, multiple-choice questions."""
