"""A CUDA card that is host memory, and the project's real CUDA path on it: real numbers, no card.

`device.cpp` answers for CUDA's dispatch key of a torch that was built without CUDA; `build` compiles it once
per machine; `device` stands in for the driver's half of `torch.cuda`, and counts; `programs` for the Triton
and bitsandbytes kernels; `run` runs jobs in a process that has such a card, or none, to compare with.

It sees: operands on the wrong device, every wait of the host for the card and the line that waits, memory to
the byte, running out of it, numbers that differ from the host's. It does not see: races of streams, what
Triton compiles (`tests/kernels/test_triton_compile.py` does), speed, the rounding of CUDA's kernels, several
cards.
"""
