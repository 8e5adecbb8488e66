"""This machine: what will be used here, and how fast it is.

Read `diagnosis` (all findings of `doctor`), `software` (versions; no torch), `hardware` (device, kernels);
`stock_tools` (`doctor --why`: what goes wrong without us, shown on the tiny base); `kernel_benchmark` (`bench
kernels`), `bench_cpu`, `bench_gpu`, and `gpu_limits` (what a GPU allows).
The benchmark is in the package because a wheel has no `benchmarks/`.
"""
