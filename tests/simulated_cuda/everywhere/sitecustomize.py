"""Gives every Python process that has this folder on its `PYTHONPATH` the card named by `SIMULATED_CARD`.

For scripts that start others, such as `benchmarks/first_gpu_run.py`. Python imports it before anything else.
"""

import os

if "SIMULATED_CARD" in os.environ:
    from tests.simulated_cuda.device import start

    device = start(os.environ["SIMULATED_CARD"])

    from tests.simulated_cuda import graphs, programs

    programs.stand_in(device)
    graphs.stand_in(device)
