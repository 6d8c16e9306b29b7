"""Text generation, and likelihoods of multiple-choice answers."""
