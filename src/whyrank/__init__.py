"""Rerankers that show their reasons."""
