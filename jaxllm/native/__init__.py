"""Kernels in C++ for the processor this runs on, compiled at their first use.

The folder holds the sources, which go with the package, and `build`, which finds a compiler
and keeps what it makes beside the compiled programs.
"""
