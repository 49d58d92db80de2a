"""What setup.py, the Makefile and pip need to find a CUDA toolchain. Not installed with the package."""
