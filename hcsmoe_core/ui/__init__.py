"""Figures, widgets, the notebooks' record and the command line."""
