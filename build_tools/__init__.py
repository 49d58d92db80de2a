"""What setup.py and the Makefile need to find a CUDA toolchain. Not installed with the package."""
