"""The implementations there are, and which comes first on which device: the one list that all others follow."""

IMPLEMENTATIONS = ("torch", "cpp", "triton", "cuda")
KERNELS = IMPLEMENTATIONS[1:]
"""Those that an operator may lack, or decline a call for."""
RANKED = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
"""By device, what a call runs on by itself: the first that is there. No GPU has timed Triton and CUDA C++ yet; a tuning
file (:mod:`mirage_kernels._runtime.tuning`) may choose the other of them for an operator."""
ON_GPUS = RANKED["cuda"]
"""Between which a tuning file chooses."""
