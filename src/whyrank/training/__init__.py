"""Teaching a small model to explain and label."""
