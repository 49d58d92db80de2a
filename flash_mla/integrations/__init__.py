"""Plugins that let serving frameworks decode with this package. Importing them imports no framework."""
