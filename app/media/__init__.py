"""Output files: what they are, whether they are whole, and how they are kept."""
