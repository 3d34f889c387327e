"""Faults put into runs of the command line at random moments, and what they may not change."""
