"""Texts as tokens: tokenised rows, conversations, packs of several, questions with choices."""
