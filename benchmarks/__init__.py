"""Speed of the kernels beside other libraries: `python -m benchmarks.decode`, then `benchmarks.plot` and `.report`."""
