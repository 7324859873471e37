"""Measurements of ppkernels against what else there is. Start with README.md; not installed."""
