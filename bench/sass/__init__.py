"""Static evidence about the CUDA kernels, from their machine code: run `python -m bench.sass`."""
