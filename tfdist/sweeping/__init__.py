"""Looks for the settings with which a recipe does best: many runs of `tfdist.train`, chosen by Optuna."""
