"""Meshes, layouts, and how a layout is applied to named axes."""
