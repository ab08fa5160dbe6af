"""Calibration text: data sets, files, and text that a model writes itself."""
