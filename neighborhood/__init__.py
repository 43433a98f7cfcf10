"""Neighborhood attention without a framework: its windows and its definition."""
