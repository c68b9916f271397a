"""How fast whyrank is: one command per question, run from a checkout."""
