"""This machine: what will be used here, and how fast it is.

Read `diagnosis` (all findings of `doctor`), `software` (versions; no torch), `hardware` (device, kernels);
`stock_tools` (`doctor --why`: what goes wrong without us, shown on the tiny base); `kernel_benchmark` (`bench
kernels`), `bench_cpu`, `bench_gpu`, and `gpu_limits` (what a GPU allows); `memory_in_use` (now);
`training_benchmark` (`bench train`), `benched_recipe` (what it asks of a recipe), `training_steps` (ours and
stock ones), which a `measured_process` takes; `generation_benchmark` and `generation_steps` (the same for
`bench generate`).
The benchmark is in the package because a wheel has no `benchmarks/`.
"""
